#!/usr/bin/env bash
# Trains, evaluates and compares kinds of attention: the lines of configs/compare/variants.txt, over seeds 0, 1 and 2.
#
#     benchmarks/quality.sh recall                          steps to learn to recall, on the tasks of tasks.txt, one core
#     benchmarks/quality.sh capacity                        how many pairs a state holds, over its size, one core
#     benchmarks/quality.sh books                           2 M tokens of books, four minutes a run on one core
#     benchmarks/quality.sh convert                         softmax turned into hybrids, and hybrids anew (convert.txt)
#     benchmarks/quality.sh documents                       books and short articles by half, documents apart and not
#     benchmarks/quality.sh books-gpu                       GPT-2 small, 131 M tokens, overnight on a GPU
#     benchmarks/quality.sh books --variants softmax flurka --seeds 0 --data FOLDER
#
# Words after the first go to benchmarks/WORD.py, which --help describes. Every finished run is at once a row in
# benchmarks/results/; a run that has a row is not made again, and what was interrupted goes on.
set -euo pipefail

base=${1:?"name one of recall, capacity, books, documents, convert, books-gpu; see the head of this file"}
shift
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${PYTHON:-.venv/bin/python}
case $base in
    recall | capacity | documents) exec "$python" "benchmarks/$base.py" --output "benchmarks/results/$base-cpu.jsonl" "$@" ;;
    books | books-gpu)
        exec "$python" benchmarks/books.py --config "configs/compare/$base.yaml" \
            --output "benchmarks/results/${base/%books/books-cpu}.jsonl" "$@"
        ;;
    convert)
        exec "$python" benchmarks/books.py --config configs/compare/convert.yaml --list configs/compare/convert.txt \
            --output benchmarks/results/convert-cpu.jsonl "$@"
        ;;
    *) echo "error: there is no $base; name one of recall, capacity, books, documents, convert, books-gpu" >&2; exit 2 ;;
esac
