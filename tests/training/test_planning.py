"""The search of settings, and the model of a step's time: not right, but sane."""

from dataclasses import replace

import pytest

from lcpt.attention import AttentionConfig
from lcpt.config import Config
from lcpt.data import DataConfig
from lcpt.model import ModelConfig
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig
from lcpt.training.fitting import HEADROOM
from lcpt.training.planning import Cluster, best_over, costs_by_policy, predict, propose, saved_by_policy
from lcpt.training.step_time import HOST_LINK, hardware
from lcpt.utils.gpus import BANDWIDTH, FP32_FLOPS, GPU_BYTES, NVLINK, gpu_peaks

CONFIG = Config(
    model=ModelConfig(n_layers=2, d_model=128, n_heads=2, vocab_size=512, attention=AttentionConfig("softmax")),
    data=DataConfig(path="-", context=1024, mask_documents=False),
    training=TrainingConfig(global_batch_tokens=64 * 1024, micro_batch=2, precision="bf16", valid_tokens=1024),
    parallel=ParallelConfig(2, deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}}),
)
SAVED = saved_by_policy(CONFIG.model)
COSTS = costs_by_policy(CONFIG, SAVED)
EIGHT = Cluster(gpu="H100-80GB", gpus=8, network=50e9)


def predicted(cluster=EIGHT, **training):
    return predict(replace(CONFIG, training=replace(CONFIG.training, **training)), COSTS, cluster)


def test_every_gpu_has_its_peaks():
    assert GPU_BYTES.keys() == BANDWIDTH.keys() == FP32_FLOPS.keys()
    for name in GPU_BYTES:
        assert gpu_peaks(name, "bf16")[0] > gpu_peaks(name, "fp32")[0] > 1e13 > gpu_peaks(name, "fp32")[1] > 5e11
    assert gpu_peaks("H200-141GB", "bf16") == (989e12, 4.8e12)
    assert GPU_BYTES.keys() - NVLINK.keys() == {"L40S-48GB"}


def test_compute_shrinks_with_the_gpus_and_grows_with_the_context():
    one, eight = (predicted(replace(EIGHT, gpus=n)) for n in (1, 8))
    assert one.seconds["compute"] == pytest.approx(8 * eight.seconds["compute"])
    assert one.seconds["network"] == 0 and one.bottleneck != "network"
    longer = replace(CONFIG, data=replace(CONFIG.data, context=4096))
    assert predict(longer, costs_by_policy(longer, SAVED), EIGHT).seconds["compute"] > eight.seconds["compute"]


def test_the_longest_part_is_the_bottleneck_and_the_step():
    fast, slow = (predicted(replace(EIGHT, network=network)) for network in (1e15, 1e6))
    assert (
        slow.bottleneck == "network" and slow.step_seconds == slow.seconds["network"] == 1e9 * fast.seconds["network"]
    )
    assert (
        fast.bottleneck != "network" and fast.step_seconds == max(fast.seconds.values()) < fast.seconds_without_overlap
    )
    assert fast.tokens_per_second == 64 * 1024 / fast.step_seconds


def test_recomputation_takes_time_and_larger_micro_batches_move_fewer_bytes():
    again = predict(replace(CONFIG, model=replace(CONFIG.model, activation_checkpointing=True)), COSTS, EIGHT)
    assert again.seconds["compute"] > predicted().seconds["compute"] and again.n_bytes < predicted().n_bytes
    memory = [
        predict(replace(CONFIG, model=replace(CONFIG.model, activation_checkpointing=policy)), COSTS, EIGHT).seconds[
            "memory"
        ]
        for policy in (False, "selective", True, "offload")
    ]
    assert memory == sorted(set(memory))  # what is not kept is written again
    for part in ("memory", "network"):
        assert predicted(micro_batch=8).seconds[part] < predicted(micro_batch=1).seconds[part]


def test_offload_takes_the_link_to_the_host():
    """Every block's input goes there and comes back, beside the optimizer's traffic."""
    config = replace(CONFIG, model=replace(CONFIG.model, activation_checkpointing="offload"))
    host = predict(config, COSTS, EIGHT).seconds["host"]
    assert host == 2 * 2 * (2 * 128) * (64 * 1024 / 8) / HOST_LINK
    both = replace(config, parallel=replace(CONFIG.parallel, offload_optimizer=True))
    alone = replace(CONFIG, parallel=both.parallel)
    optimizer = predict(alone, COSTS, EIGHT).seconds["host"]
    assert predict(both, COSTS, EIGHT).seconds["host"] == pytest.approx(host + optimizer)
    assert "host" not in predicted().seconds


def test_all_settings_are_tried_and_the_fastest_is_first():
    found = propose(CONFIG, COSTS, EIGHT)
    tried = {(p.zero_stage, p.sequence, p.micro_batch, p.activation_checkpointing) for p in found}
    # Stage 0 has no bf16; of 64 sequences 1, 2, 4 or 8 GPUs share each.
    assert len(found) == len(tried) == 3 * (4 + 5 + 6 + 7) * 4
    assert found[0].step_seconds == min(p.step_seconds for p in found)
    for faster, slower in zip(found, found[1:], strict=False):
        assert faster.step_seconds <= slower.step_seconds
    with pytest.raises(ValueError, match="do not divide among 3 ranks"):
        propose(CONFIG, COSTS, replace(EIGHT, gpus=3))


def shared(ranks, **changes):
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, sequence=ranks), **changes)
    return predict(config, costs_by_policy(config, SAVED), EIGHT)


def test_gpus_that_share_sequences_have_the_same_work_and_wait_for_the_exchange():
    alone, two, eight = (shared(ranks) for ranks in (1, 2, 8))
    assert [p.micro_batches for p in (alone, two, eight)] == [4, 8, 32]  # half and an eighth of the tokens each
    assert alone.seconds["compute"] == two.seconds["compute"] == eight.seconds["compute"]
    assert alone.memory["activations"] == 2 * two.memory["activations"] == 8 * eight.memory["activations"]
    assert "exchange" not in alone.seconds and alone.exchanged == 0
    assert 0 < two.exchanged < eight.exchanged
    for p in (two, eight):
        assert p.seconds["exchange"] == pytest.approx(p.exchanged / (0.8 * NVLINK["H100-80GB"]))
        others = max(seconds for part, seconds in p.seconds.items() if part != "exchange")
        assert p.step_seconds == others + p.seconds["exchange"]
    again = shared(8, model=replace(CONFIG.model, activation_checkpointing=True))
    # Forward and backward passes send the same here, but for the key of the key shift.
    assert 1.5 * eight.exchanged == pytest.approx(again.exchanged, rel=1e-3)


def test_more_gpus_than_a_machine_has_share_over_the_network():
    within, between = (hardware("H100-80GB", "bf16", 50e9).exchange_seconds(1e9, ranks) for ranks in (8, 16))
    assert between == 9 * within
    assert hardware("L40S-48GB", "bf16", 50e9).exchange_seconds(1e9, 2) == between  # which has no NVLink


def test_keys_of_all_ranks_are_counted_where_they_are_kept():
    kept = {policy: shared(4, model=replace(CONFIG.model, activation_checkpointing=policy)) for policy in (False, True)}
    # K and V in bf16, of two layers, two sequences of 1,024 tokens (256 of them its own, of which the keys are not
    # kept twice), d_model 128.
    assert kept[False].memory["exchanged keys and states"] == pytest.approx(
        2 * 2 * 2 * 2 * (1024 - 128) * 128, rel=1e-4
    )
    assert "exchanged keys and states" not in kept[True].memory
    again = SAVED[True].at_times * 2 * 2 * 256 + 2 * 2 * 2 * 2 * 1024 * 128 + 2 * 2 * 2 * (1024 - 128) * 128
    assert kept[True].memory["loss, or a block made again"] == pytest.approx(again, rel=1e-4)


def test_contexts_that_no_gpu_holds_fit_where_gpus_share_them(monkeypatch):
    [alone] = best_over(CONFIG, EIGHT, [2**16], [1])[2**16].values()
    least = min(p.n_bytes for p in propose(*at_context(2**16), replace(EIGHT, gpus=1)))
    monkeypatch.setitem(GPU_BYTES, "H100-80GB", 0.9 * least / (1 - HEADROOM))
    found = best_over(CONFIG, EIGHT, [2**16], [1, 8])[2**16]
    assert alone.sequence == 1 and 1 not in found and found[8].sequence == 8


def at_context(context):
    training = replace(CONFIG.training, global_batch_tokens=context, micro_batch=1)
    config = replace(CONFIG, data=replace(CONFIG.data, context=context), training=training)
    return config, costs_by_policy(config, SAVED)


def test_the_optimizer_goes_to_the_host_only_where_nothing_fits_without(monkeypatch):
    least = min(p.n_bytes for p in propose(CONFIG, COSTS, EIGHT))
    monkeypatch.setitem(GPU_BYTES, "H100-80GB", least / (1 - HEADROOM) + 1)
    found = propose(CONFIG, COSTS, EIGHT)
    assert found and all(p.n_bytes < least + 1 and not p.offload_optimizer and p.fits("H100-80GB") for p in found)
    monkeypatch.setitem(GPU_BYTES, "H100-80GB", least / (1 - HEADROOM) - 1)
    found = propose(CONFIG, COSTS, EIGHT)
    assert found and all(p.offload_optimizer and p.seconds["host"] > 0 and "optimizer" not in p.memory for p in found)
    monkeypatch.setitem(GPU_BYTES, "H100-80GB", 1000)
    assert propose(CONFIG, COSTS, EIGHT) == []


def test_over_contexts_a_step_keeps_its_tokens_where_it_can():
    found = best_over(CONFIG, EIGHT, [2048, 2**20], [1, 8, 24])
    assert {n: best.tokens for n, best in found[2048].items()} == {1: 2**16, 8: 2**16, 24: 24 * 2048}
    assert {n: best.tokens for n, best in found[2**20].items()} == {1: 2**20, 8: 2**20, 24: 3 * 2**20}
    assert {n: best.sequence for n, best in found[2**20].items()} == {1: 1, 8: 8, 24: 8}  # 24 divide no such context
    learned = replace(CONFIG, model=replace(CONFIG.model, positions="learned", max_positions=2048))
    assert list(best_over(learned, EIGHT, [2048, 4096], [8])) == [2048]
