#!/usr/bin/env bash
# What this machine's GPU makes of lcpt, in at most ten minutes: are the kernels right here, and how fast.
#
#     benchmarks/gpu.sh                  one NVIDIA GPU of 80 GB; writes into benchmarks/results
#     OUT=FOLDER benchmarks/gpu.sh       writes there
#
# Ten stages, each with its own time limit: one that fails or hangs is named at the end, the others run, and the exit
# code is 1. Files are named after the GPU:
#
#     kernels-GPU.json      what its Triton makes of the kernels: registers, spills, tensor-core instructions
#     correct-GPU.json      kernels at real sizes against float64, and against themselves bit by bit
#     fused-GPU.json        what stands around the attention kernels: right, bytes, time, beside PyTorch and compiled
#     attention-GPU.json    time and memory, 2k to 128k tokens, against SDPA; .md is the table, .png the picture
#     rivals-GPU.json       the same against FlexAttention, a sliding window and, where it is installed,
#                           flash-linear-attention, which compile and tune for a minute or two
#     training-GPU.json     steps of GPT-2 small, 8k to 64k tokens; .md is the table
#     families-GPU.json     the other kinds of linear or sparse attention, 8k to 32k tokens, against SDPA
#     sparse-N-GPU.json     sparse attention as its paper sets it: 8 buckets and 0.3 dropped, 16 and 0.5, 32 and 0.7
#
#     WHEELS=FOLDER   wheels of Python packages that are missing here (omegaconf, flash-linear-attention …)
#     PYTHON=FILE     the Python to take (.venv/bin/python where there is one, else python3)
#     STAGES="kernels correct fused attention rivals training families sparse-8 sparse-16 sparse-32"   those to run
set -uo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
out=${OUT:-benchmarks/results}
every="kernels correct fused attention rivals training families sparse-8 sparse-16 sparse-32"
stages=${STAGES:-$every}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}

fail() { echo "error: $*" >&2; exit 2; }
for stage in $stages; do
    [[ " $every " = *" $stage "* ]] || fail "no stage is called $stage"
done
if [ -n "${WHEELS:-}" ]; then
    compgen -G "$WHEELS/*.whl" >/dev/null || fail "there are no wheels in $WHEELS"
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl ||
        fail "the wheels in $WHEELS could not be installed"
    export PYTHONPATH=$PYTHONPATH:$site
fi
# "NVIDIA H100 80GB HBM3" and 9.0 -> "nvidia-h100-80gb-hbm3 sm_90"
found=$("$python" - 2>&1 <<'END'
import re
try:
    import torch
except ImportError:
    raise SystemExit("this Python has no torch")
if not torch.cuda.is_available():
    raise SystemExit("PyTorch finds no GPU here")
name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(name, "sm_%d%d" % torch.cuda.get_device_capability())
END
) || fail "${found##*$'\n'}"
read -r gpu target <<<"${found##*$'\n'}"
mkdir -p "$out" || fail "cannot make $out"

failed=()
run() { # seconds, name, command: within that time
    local limit=$1 name=$2 code
    shift 2
    [[ " $stages " = *" $name "* ]] || return 0
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$python" "$@"
    code=$?
    case $code in
        0) ;;
        124 | 137) failed+=("$name (not done in $limit s)") ;;
        *) failed+=("$name (exit code $code)") ;;
    esac
}

run 40 kernels tools/kernel_report.py --targets "$target" --output "$out/kernels-$gpu.json"
run 95 correct benchmarks/check_kernels.py --limit 80 --output "$out/correct-$gpu.json"
run 50 fused benchmarks/fused.py --compiled norm_rotary,learned_sketch --output "$out/fused-$gpu.json"
benchmark=(tools/benchmark_attention.py --device cuda --tokens 65536 --heads 12 --head-dim 64 --dtype bf16 --repeats 20
    --budget 0.5 --set polysketch.size=32 block_size=256)
run 80 attention "${benchmark[@]}" --methods polysketch,squared,sdpa_flash,sdpa_cudnn,sdpa_efficient \
    --contexts 2048,4096,8192,16384,32768,65536,131072 --output "$out/attention-$gpu.json"
run 100 rivals "${benchmark[@]}" --methods squared,sdpa_flash,sdpa_cudnn,flex,window,fla_simple_gla,fla_based \
    --contexts 8192,32768,65536 --output "$out/rivals-$gpu.json"
run 100 training tools/benchmark_training.py --configs configs/gpt2-small-8k.yaml,configs/gpt2-small-32k.yaml \
    --kinds own,softmax --sdpa flash,cudnn --contexts 8192,16384,32768,65536 --tokens 65536 --repeats 3 \
    --output "$out/training-$gpu.json"
run 60 families "${benchmark[@]}" --methods polysketch,kernel,flurka,feedforward,fastmax,lowrank,sdpa_flash,sdpa_cudnn \
    --contexts 8192,16384,32768 --output "$out/families-$gpu.json"
for setting in "8 0.3" "16 0.5" "32 0.7"; do
    read -r buckets drop <<<"$setting"
    run 22 "sparse-$buckets" "${benchmark[@]}" "sparse_hash.buckets=$buckets" "sparse_qk.drop=$drop" \
        --methods sparse_hash,sparse_qk,sdpa_flash,sdpa_cudnn,flex_qk,flex_hash --contexts 8192,16384,32768 \
        --output "$out/sparse-$buckets-$gpu.json"
done

if [ ${#failed[@]} != 0 ]; then
    names=$(printf ', %s' "${failed[@]}")
    echo "error: failed: ${names:2}" >&2
    exit 1
fi
echo "written to $out: $(for stage in $stages; do echo -n "$stage-$gpu.json "; done)"
