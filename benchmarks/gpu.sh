#!/usr/bin/env bash
# Whether the kernels are right on this machine's NVIDIA GPU, and how fast they are. 80 GB of memory are enough.
#
#     benchmarks/gpu.sh quick    at most 210 s: what its Triton makes of the kernels; their results at real sizes, held
#                                against float64 and themselves; attention at 8k, 32k and 64k tokens beside SDPA
#     benchmarks/gpu.sh full     at most 400 s: training steps, rivals, other kinds of attention, sparse attention, what
#                                stands around attention, and the cross-entropy alone
#     benchmarks/gpu.sh loop     at most 290 s: the real training loop under DeepSpeed, ZeRO stages 1 to 3, compiled or
#                                not: tokens a second, MFU, memory, and the device's time by part
#
# First the kernels are compiled on all cores. Each stage has its own time limit and writes rows as it has them: what is
# done when the time is over is kept. A stage that fails, hangs or lacks an import is named, the others run, and the exit
# code is 1. Files of a run, of which the archive is always whole, and refreshed every second:
#
#     RESULTS/gpu-RUN-GPU/         STAGE.json, .md (a table), .png (a picture), .log; stages.txt says how each ended
#     OUT/gpu-RUN-GPU.tar.gz       all of these
#
#     RESULTS=FOLDER    (benchmarks/results)
#     OUT=FOLDER        where the archive goes (RESULTS)
#     WHEELS=FOLDER     wheels of packages that this Python lacks, collected elsewhere with
#                       pip download --no-deps --only-binary=:all: --python-version 3.12 -d FOLDER omegaconf ...
#     LCPT_COMMIT=ID    the commit that results name where this checkout has no .git
#     PYTHON=FILE       (.venv/bin/python where there is one, else python3)
#     STAGES="..."      the stages of the run to do (all)
set -uo pipefail

fail() { echo "error: $*" >&2; exit 2; }
case "$#:${1:-}" in
    1:quick) every="warm kernels correct attention" ;;
    1:full) every="warm training rivals families sparse-16 sparse-8 sparse-32 sparse-flex fused" ;;
    1:loop) every="warm loop-8k loop-32k" ;;
    *) echo "usage: benchmarks/gpu.sh quick | full | loop" >&2; exit 2 ;;
esac
run=$1
stages=${STAGES:-$every}
for stage in $stages; do
    [[ " $every " = *" $stage "* ]] || fail "$run has no stage $stage, but $every"
done
cd "$(dirname "$0")/.."
results=${RESULTS:-benchmarks/results}
out=${OUT:-$results}
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

within() { timeout --kill-after=2 "$@"; } # seconds, command
site=
found=
child=
trap '[ -z "$site" ] || rm -rf "$site"' EXIT
if [ -n "${WHEELS:-}" ]; then
    compgen -G "$WHEELS/*.whl" >/dev/null || fail "there are no wheels in $WHEELS"
    site=$(mktemp -d)
    within 12 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl ||
        found="say the wheels in $WHEELS could not be installed"$'\n' # many stages need none
    export PYTHONPATH=$PYTHONPATH:$site
fi
looked=$(within 15 "$python" benchmarks/gpu_imports.py $stages) || fail "${looked:-cannot look for a GPU}"
found+=$looked
read -r _ gpu target <<<"$(grep '^gpu ' <<<"$found")"
name=gpu-$run-$gpu
folder=$results/$name
mkdir -p "$folder" "$out" || fail "cannot make $folder or $out"
: >"$folder/stages.txt"

say() { echo "$*" | tee -a "$folder/stages.txt"; }
archive() { # renamed into its place, so that it is whole whenever this script is killed
    tar -C "$results" --exclude='.*' -czf "$out/.$name.partial" "$name" 2>/dev/null
    [ $? -gt 1 ] || mv "$out/.$name.partial" "$out/$name.tar.gz" # 1: a file grew meanwhile
}
stop() {
    [ -z "$child" ] || kill "$child"
    say "stopped before the end"
    archive
    exit 143
}
trap stop INT TERM HUP
sed -n 's/^say //p' <<<"$found" | tee -a "$folder/stages.txt"

failed=()
stage() { # seconds, name, command: within that time, while the archive is refreshed
    local limit=$1 stage=$2 began=$SECONDS lacks code
    shift 2
    [[ " $stages " = *" $stage "* ]] || return 0
    rm -f "$folder/$stage".*
    lacks=$(sed -n "s/^lacks $stage //p" <<<"$found")
    if [ -n "$lacks" ]; then
        failed+=("$stage (no $lacks)")
        return
    fi
    echo "== $stage (at most $limit s)"
    within "$limit" "$python" "$@" >"$folder/$stage.log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.5
        archive
    done
    wait "$child"
    code=$?
    child=
    cat "$folder/$stage.log"
    case $code in
        0) say "$stage: done in $((SECONDS - began)) s" ;;
        124 | 137) failed+=("$stage (not done in $limit s)") ;;
        *) failed+=("$stage (exit code $code)") ;;
    esac
    [ $code = 0 ] || say "failed: ${failed[-1]}"
    archive
}

attention=(tools/benchmark_attention.py --device cuda --tokens 65536 --heads 12 --head-dim 64 --dtype bf16)
if [ "$run" = quick ]; then
    stage 40 warm benchmarks/warm.py --target "$target" attention correct
    stage 28 kernels tools/kernel_report.py --targets "$target" --output "$folder/kernels.json"
    stage 50 correct benchmarks/check_kernels.py --repeats 20 --limit 42 --output "$folder/correct.json"
    stage 50 attention "${attention[@]}" --methods squared,polysketch,sdpa_flash,sdpa_cudnn,sdpa_efficient \
        --contexts 8192,32768,65536 --mode forward_backward,forward --repeats 20 --budget 0.5 \
        --output "$folder/attention.json"
elif [ "$run" = loop ]; then
    stage 30 warm benchmarks/warm.py --target "$target" training
    stage 134 loop-8k benchmarks/training_loop.py --config configs/gpt2-small-8k.yaml --limit 33 \
        --variants zero1-compiled,zero1,zero3-compiled,zero2-compiled --output "$folder/loop-8k.json"
    stage 84 loop-32k benchmarks/training_loop.py --config configs/gpt2-small-32k.yaml --limit 41 --micro-batches 2 \
        --variants zero1-compiled,zero1 --output "$folder/loop-32k.json"
else
    attention+=(--mode forward_backward --repeats 10 --budget 0.25)
    stage 30 warm benchmarks/warm.py --target "$target" training families sparse fused
    stage 88 training tools/benchmark_training.py --configs configs/gpt2-small-32k.yaml,configs/gpt2-small-8k.yaml \
        --kinds own,softmax --sdpa flash,cudnn --contexts 32768,8192,65536,16384 --tokens 65536 --repeats 3 \
        --output "$folder/training.json"
    stage 78 rivals "${attention[@]}" --contexts 32768,8192,65536 --output "$folder/rivals.json" \
        --methods squared,sdpa_flash,sdpa_cudnn,flex,window,fla_simple_gla,fla_based
    stage 35 families "${attention[@]}" --contexts 8192,32768,16384 --output "$folder/families.json" \
        --methods polysketch,kernel,flurka,feedforward,fastmax,lowrank,sdpa_flash,sdpa_cudnn
    sparse=("${attention[@]}" --methods sparse_hash,sparse_qk,sdpa_flash,sdpa_cudnn --contexts 8192,16384,32768)
    stage 15 sparse-16 "${sparse[@]}" --output "$folder/sparse-16.json" # buckets, and half dropped: the defaults
    stage 15 sparse-8 "${sparse[@]}" --output "$folder/sparse-8.json" \
        --set sparse_hash.buckets=8 sparse_qk.drop=0.3
    stage 15 sparse-32 "${sparse[@]}" --output "$folder/sparse-32.json" \
        --set sparse_hash.buckets=32 sparse_qk.drop=0.7
    stage 36 sparse-flex "${attention[@]}" --methods sparse_hash,sparse_qk,flex_hash,flex_qk --contexts 8192 \
        --output "$folder/sparse-flex.json"
    stage 37 fused benchmarks/fused.py --compiled norm_rotary,learned_sketch --output "$folder/fused.json"
fi

archive
if [ ${#failed[@]} != 0 ]; then
    names=$(printf ', %s' "${failed[@]}")
    echo "error: failed: ${names:2}; what there is, is in $out/$name.tar.gz" >&2
    exit 1
fi
say "written to $folder and $out/$name.tar.gz"
archive
