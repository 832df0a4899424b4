"""Read the rows of a Parquet file, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

from lcpt.data.errors import DataError
from lcpt.utils.errors import first_line


def read_parquet(name: str, location: str, field: str) -> Iterator[tuple[str, object, object]]:
    """Yield (file:row, id or None, text or None) of each row, rows counted from 1."""
    from pyarrow import ArrowException, parquet  # imported late: few inputs need it

    number = 0
    try:
        with parquet.ParquetFile(location) as file:
            columns = [column for column in ("id", field) if column in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", row.get("id"), row.get(field)
    except (ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read after row {number} ({first_line(error)}); fetch it again") from None
