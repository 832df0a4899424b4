"""Plan a run on paper, before a GPU is bought: parameters, memory, communication and FLOPs of a config on so many GPUs,
and the settings that fit and are fastest, found by trying all of them.

Counts are those of what really runs. Times are a model: each part of the hardware works at a fixed part of its peak
(lcpt/training/step_time.py), so a real step takes longer; what it shows is which setting wins, and what limits it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from lcpt.attention.base import LinearCost
from lcpt.benchmarking.cost_plots import cells, over_slices
from lcpt.commands.arguments import check_output
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.config import Config, load_config
from lcpt.model.cost import Cost, Saved
from lcpt.model.sequence_cost import layers_by_kind
from lcpt.training import step_time
from lcpt.training.fitting import HEADROOM
from lcpt.training.out_of_memory import count_parameters
from lcpt.training.phases import Phase, divide
from lcpt.training.planning import (
    Cluster,
    Prediction,
    best_over,
    check_divides,
    costs_by_policy,
    predict,
    propose,
    saved_by_policy,
)
from lcpt.training.sequence_schemes import compare_schemes
from lcpt.training.slices import check_slices
from lcpt.training.step_time import hardware
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.figures import Heading
from lcpt.utils.gpus import GPU_BYTES, gpu_bytes
from lcpt.utils.provenance import report_header

EXAMPLE = """example:
  lcpt plan --config configs/gpt2-small-32k.yaml --gpus 8 --output plan.json
  lcpt plan --config configs/gpt2-large-32k.yaml --gpus 64 --gpu H200-141GB --network 25 --plot plan.png \\
      training.global_batch_tokens=4194304 --output plan.json"""
SHOWN = 10
CONTEXTS = tuple(2**n for n in range(11, 21))  # of the plot
ASSUMED = ("PRODUCTS", "ATTENTION", "MEMORY", "NETWORK", "HOST_LINK", "HOST_MEMORY", "MACHINE")  # by its times


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="X.yaml")
    parser.add_argument("--gpus", required=True, type=int, metavar="N")
    parser.add_argument("--gpu", default="H100-80GB", metavar="NAME", help=f"{', '.join(GPU_BYTES)} (H100-80GB)")
    parser.add_argument(
        "--network",
        type=float,
        default=50.0,
        metavar="GB/s",
        help="of each GPU to the others, each way (50, as InfiniBand of 400 Gb/s for each has)",
    )
    parser.add_argument("--output", required=True, metavar="OUT.json")
    parser.add_argument("--plot", metavar="FILE.png", help="what fits, and how fast, over contexts and numbers of GPUs")
    parser.add_argument(
        "--sequence-plot",
        metavar="FILE.png",
        help="what ranks that share sequences send: state exchange, Ulysses, ring",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    config, cluster = check(args)
    saved = saved_by_policy(config.model)
    report = report_header(torch.device("cpu")) | {
        "device": f"model of {args.gpus} x {args.gpu}",
        "gpu": args.gpu,
        "gpus": args.gpus,
        "network_bytes_per_second": cluster.network,
        "headroom": HEADROOM,
        "assumed": {name.lower(): getattr(step_time, name) for name in ASSUMED},
        "phases": [plan_phase(phase, cluster, saved) for phase in divide(config)],
    }
    if args.plot:
        report["grid"] = draw(config, cluster, Path(args.plot))
    if args.sequence_plot:
        report["sequence"] = draw_schemes(config, cluster, Path(args.sequence_plot))
    replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    print("\n\n".join(table(phase, report) for phase in report["phases"]))
    if args.sequence_plot:
        print("\n" + shared_table(report["sequence"]))
    print(f"\nwritten to {', '.join(filter(None, (args.output, args.plot, args.sequence_plot)))}")
    return 0


def check(args: argparse.Namespace) -> tuple[Config, Cluster]:
    """Read the config and what it shall run on. Raises ValueError that names what is wrong."""
    if args.gpus < 1:
        raise ValueError(f"--gpus is {args.gpus}; it must be ≥ 1")
    if not 0 < args.network < float("inf"):
        raise ValueError(f"--network is {args.network}; it must be > 0 and finite, in GB/s")
    gpu_bytes(args.gpu)
    config = load_config(args.config, ["run.dir=none", *args.overrides])
    count_parameters(config.model)
    layers = layers_by_kind(config.model)
    if args.sequence_plot and not any(isinstance(kind.layer, LinearCost) for kind in layers):
        raise ValueError(
            f"--sequence-plot compares ways to share layers of linear cost, and the model has none of them "
            f"({', '.join(kind.name for kind in layers)}); take another model.attention.kind, as polysketch"
        )
    for phase in divide(config):
        try:
            check_slices(phase.config, args.gpus)
            check_divides(phase.config, layers, args.gpus)
        except ValueError as error:
            raise ValueError(f"{phase.name}{error}") from None
    for file in (args.output, args.plot, args.sequence_plot):
        check_output(file)
    return config, Cluster(gpu=args.gpu, gpus=args.gpus, network=args.network * 1e9)


def plan_phase(phase: Phase, cluster: Cluster, saved: dict[bool | str, Saved]) -> dict:
    """Plan one part of a run: what it costs in any setting, the config's own setting, and all that fit."""
    config = phase.config
    costs = costs_by_policy(config, saved)
    proposals = propose(config, costs, cluster)
    try:
        configured = row(predict(config, costs, cluster), cluster)
    except ValueError as error:
        configured = {"error": str(error)}
    cost, _ = costs.by_policy[config.model.activation_checkpointing]
    return {
        "phase": phase.number,
        "first_step": phase.first_step,
        "last_step": phase.last_step,
        "context": config.data.context,
        "tokens_per_step": config.training.global_batch_tokens,
        "precision": config.training.precision,
        "parameters": cost.parameters,
        "flops_per_token": flops(cost),
        "configured": configured,
        "proposals": [row(prediction, cluster) for prediction in proposals],
    }


def flops(cost: Cost) -> dict[str, dict[str, float]]:
    return {part: counted._asdict() for part, counted in cost.flops.items()}


def row(prediction: Prediction, cluster: Cluster) -> dict:
    p = prediction
    return {
        "zero_stage": p.zero_stage,
        "sequence": p.sequence,
        "micro_batch": p.micro_batch,
        "micro_batches": p.micro_batches,
        "activation_checkpointing": p.activation_checkpointing,
        "offload_optimizer": p.offload_optimizer,
        "fits": p.fits(cluster.gpu),
        "memory_bytes": p.memory,
        "communication_bytes": {"all-gather": p.sent.gathered, p.sent.reduction: p.sent.reduced},
        "exchange_bytes": p.exchanged,
        "communication_bytes_on_wire": p.sent.on_wire(cluster.gpus),
        "model": {
            "seconds": p.seconds,
            "step_seconds": p.step_seconds,
            "step_seconds_without_overlap": p.seconds_without_overlap,
            "bottleneck": p.bottleneck,
            "tokens_per_second": p.tokens_per_second,
        },
    }


def draw(config: Config, cluster: Cluster, file: Path) -> list[dict]:
    """Plot the best setting of contexts and numbers of GPUs; returns a row for each."""
    most = max(8, cluster.gpus)
    gpus = sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), cluster.gpus})
    found = best_over(config, cluster, sorted({*CONTEXTS, config.data.context}), gpus)
    shown = {
        f"{n:,}": {
            f"{context:,}": (best[n].tokens_per_second, f"{short(best[n].tokens_per_second)}\n{setting(best[n])}")
            for context, best in found.items()
            if n in best
        }
        for n in gpus
    }
    heading = Heading(
        "Tokens a second by a model, not measured, and the setting that reaches it",
        f"{cluster.gpu}, {cluster.network / 1e9:g} GB/s, {config.training.precision}",
        "Z: stage of ZeRO, ÷: GPUs that share a sequence, ×: sequences at a time, –: nothing fits; activation "
        "checkpointing s: selective, c: full, o: with offload",
    )
    cells(heading, "tokens of context", "GPUs", [f"{context:,}" for context in found], shown, file)
    return [
        {"context": context, "gpus": n, **row(prediction, cluster)}
        for context, best in found.items()
        for n, prediction in best.items()
    ]


def short(number: float) -> str:
    return f"{number / 1e6:.3g}M" if number >= 999.5e3 else f"{number / 1e3:.3g}k"


def setting(p: Prediction) -> str:
    """Name a setting in few letters: ZeRO's stage, GPUs that share a sequence, sequences at a time, checkpointing."""
    policy = {False: "", "selective": " s", True: " c", "offload": " o"}[p.activation_checkpointing]
    shared = f" ÷{p.sequence}" if p.sequence > 1 else ""
    return f"Z{p.zero_stage}{shared} ×{p.micro_batch}{policy}{' host' * p.offload_optimizer}"


def draw_schemes(config: Config, cluster: Cluster, file: Path) -> dict:
    """Plot what ranks that share sequences send for the first kind of linear cost, by each scheme; returns all that is
    known of it."""
    found = compare_schemes(config, hardware(cluster.gpu, config.training.precision, cluster.network))
    kind, rows = next(iter(found["schemes"].items()))
    lines: dict[tuple[str, int], list[tuple]] = {}
    for one in rows:
        lines.setdefault((one["scheme"], one["ranks"]), []).append((one["tokens"], one["bytes"], one["seconds"]))
    heading = Heading(
        f"Forward pass of a layer of {kind}, by a model, not measured",
        f"{cluster.gpu}, {cluster.network / 1e9:g} GB/s between machines of 8, {config.training.precision}",
    )
    drawn = []
    for (scheme, ranks), points in lines.items():
        tokens, n_bytes, seconds = map(list, zip(*points, strict=True))
        drawn.append((scheme, ranks, tokens, n_bytes, seconds))
    over_slices(heading, drawn, file)
    return found


def shared_table(found: dict) -> str:
    """Show what kinds send where ranks share sequences, and from when on states are less than keys or heads."""
    contexts = list(dict.fromkeys(one["context"] for one in found["layers"]))
    sent = {(one["kind"], one["context"]): one["bytes"] for one in found["layers"]}
    ranks = found["layers"][0]["ranks"]
    lines = [f"{f'MB a layer, {ranks} ranks a sequence':32}" + "".join(f"{f'{c:,} tokens':>16}" for c in contexts)]
    for kind in dict.fromkeys(kind for kind, _ in sent):
        values = [sent[kind, context] for context in contexts]
        lines.append(f"  {kind:30}" + "".join(f"{'–' if n is None else f'{n / 1e6:,.3f}':>16}" for n in values))
    for kind, by_ranks in found["break_even"].items():
        schemes = by_ranks[ranks]
        parts = [
            f"{scheme} from {', '.join(f'{by_ranks[n][scheme]:,} (of {n})' for n in by_ranks)}" for scheme in schemes
        ]
        lines.append(f"{kind}: no more bytes than by {'; '.join(parts)} tokens a rank on")
    return "\n".join(lines)


def table(phase: dict, report: dict) -> str:
    """Show a phase as text."""
    rows = {
        "phase": f"{phase['phase']}, steps {phase['first_step']:,} to {phase['last_step']:,}" if phase["phase"] else "",
        "on": f"{report['gpus']} x {report['gpu']}, {report['network_bytes_per_second'] / 1e9:g} GB/s",
        "a step": f"{phase['tokens_per_step']:,} tokens, {phase['context']:,} of context, {phase['precision']}",
        "parameters": f"{phase['parameters']:,}",
    }
    lines = [f"{name:20}{value}" for name, value in rows.items() if value]
    lines += ["", f"{'MFLOPs a token':32}{'forward':>12}{'backward':>12}{'recomputed':>12}"]
    lines += [
        f"  {part:30}" + "".join(f"{count / 1e6:12,.2f}" for count in counted.values())
        for part, counted in phase["flops_per_token"].items()
    ]
    lines += ["", "as configured", *configured_lines(phase["configured"], report)]
    proposals = phase["proposals"]
    free = f"{report['headroom']:.0%} of {report['gpu']} free"
    if not proposals:
        return "\n".join([*lines, "", f"nothing fits with {free}: more GPUs, larger ones, or a shorter data.context"])
    lines += [
        "",
        f"{len(proposals)} settings fit with {free}; the fastest by a model, in which all but exchange overlap:",
    ]
    lines += [
        f"{'stage':>6}{'sequence':>10}{'micro_batch':>13}{'checkpointing':>15}{'offload':>9}{'GiB':>8}{'s a step':>10}"
        f"{'tokens/s':>13}  limited by"
    ]
    for found in proposals[:SHOWN]:
        model, checkpointing = found["model"], str(found["activation_checkpointing"]).lower()
        lines.append(
            f"{found['zero_stage']:>6}{found['sequence']:>10}{found['micro_batch']:>13}{checkpointing:>15}"
            f"{str(found['offload_optimizer']).lower():>9}{sum(found['memory_bytes'].values()) / 2**30:8.1f}"
            f"{model['step_seconds']:10.3f}{model['tokens_per_second']:13,.0f}  {model['bottleneck']}"
        )
    return "\n".join([*lines, "", "take: " + overrides(proposals[0])])


def configured_lines(found: dict, report: dict) -> list[str]:
    if "error" in found:
        return [f"  {found['error']}"]
    sizes = found["memory_bytes"]
    verdict = "fits" if found["fits"] else f"does not fit with {report['headroom']:.0%} left free"
    lines = [f"  {'memory a rank':24}{gib(sum(sizes.values()))} of {gib(gpu_bytes(report['gpu']))}: {verdict}"]
    lines += [f"    {part:32}{gib(n_bytes)}" for part, n_bytes in sizes.items()]
    if report["gpus"] > 1:
        lines.append("  communication a step")
        for collective, n_bytes in found["communication_bytes"].items():
            times = found["micro_batches"] if is_each_micro_batch(found["zero_stage"], collective) else 1
            each = f", {gib(n_bytes / times)} in each of {times} micro-batches" if times > 1 else ""
            lines.append(f"    {collective:32}{gib(n_bytes)}{each}")
        if found["sequence"] > 1:
            name = f"among {found['sequence']} ranks a sequence"
            lines.append(f"    {name:32}{gib(found['exchange_bytes'])}")
    model = found["model"]
    parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in model["seconds"].items())
    return [
        *lines,
        f"  {'a step, by a model':24}{model['step_seconds']:.3f} s, limited by {model['bottleneck']} ({parts}; "
        f"{model['step_seconds_without_overlap']:.3f} s if one by one)",
        f"  {'tokens/s, by a model':24}{model['tokens_per_second']:,.0f}",
    ]


def is_each_micro_batch(stage: int, collective: str) -> bool:
    return stage == 3 or (stage == 2 and collective != "all-gather")


def overrides(found: dict) -> str:
    return (
        f"parallel.zero_stage={found['zero_stage']} parallel.sequence={found['sequence']} "
        f"training.micro_batch={found['micro_batch']} "
        f"model.activation_checkpointing={str(found['activation_checkpointing']).lower()} "
        f"parallel.offload_optimizer={str(found['offload_optimizer']).lower()}"
    )


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
