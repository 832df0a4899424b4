"""lm-evaluation-harness' own model `hf` on an export scores and continues as our model `lcpt` does."""

from types import SimpleNamespace

import pytest

from tests.model.conftest import config
from tests.model.huggingface.conftest import load

pytest.importorskip("lm_eval", reason="pip install lcpt[eval]")
pytest.importorskip("accelerate", reason="lm_eval's model hf imports it")

PAIRS = [("The river saw a", " green bird"), ("The river saw a", " house"), ("Never quickly.\n", "walked"), ("", "the")]
LONG = "The old house walked under the small green river. " * 9  # several windows of 64 tokens


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


@pytest.fixture
def models(make_export, tmp_path):
    """models(**options) -> (ours, the harness's own with these options)."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from lcpt.evaluation.lm_eval_model import LcptLM

    folder, _ = make_export(config(vocab_size=330))

    def make(**options):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)
        theirs = HFLM(pretrained=load(folder), tokenizer=tokenizer, batch_size=3, device="cpu")
        return LcptLM(str(tmp_path / "mine-of-lcpt"), device="cpu", batch_size=3), theirs

    return make


def test_continuations(models):
    ours, theirs = models()
    expected, found = (model.loglikelihood(requests(*PAIRS), disable_tqdm=True) for model in (ours, theirs))
    assert theirs.max_length == ours.max_length == 64
    for (log_p, likeliest), (theirs_log_p, theirs_likeliest) in zip(expected, found, strict=True):
        assert theirs_log_p == pytest.approx(log_p, rel=1e-5) and theirs_likeliest == likeliest


def test_whole_texts(models):
    """Told to add no BOS: the harness puts one before a whole text itself, and would score the tokenizer's, too."""
    ours, theirs = models(add_bos_token=False)
    expected, found = (
        model.loglikelihood_rolling(requests((LONG,), ("Never.\n",)), disable_tqdm=True) for model in (ours, theirs)
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_answers(models):
    """Batched, with padding on the left, until a stop."""
    ours, theirs = models()
    given = requests(
        *((text, {"until": ["a"], "max_gen_toks": 12}) for text in ("The river", "Never quickly. The", LONG))
    )
    assert theirs.generate_until(given, disable_tqdm=True) == ours.generate_until(given, disable_tqdm=True)
