#!/usr/bin/env bash
# Trains, evaluates and compares kinds of attention: every line of configs/compare/variants.txt from one base config.
#
#     benchmarks/quality.sh books                 minutes a variant on one core, on the demo's books (make data)
#     benchmarks/quality.sh recall softmax elu1   associative recall, of these variants only
#     benchmarks/quality.sh books-gpu             overnight on a GPU, three seeds
#
# The first word names the base, configs/compare/WORD.yaml. What is finished is not done again, what was interrupted goes
# on: the same command continues. A variant that fails is named, the others run, and the exit code is 1.
#
#     DATA=FOLDER     books in FOLDER/train and FOLDER/valid, prepared by tools/prepare_data.py, in place of the base's
#     SEEDS="0 1 2"   run.seed of the runs of a variant (0; in bases named -gpu 0 1 2)
#     RUNS=FOLDER     where the run folders go (runs/compare)
set -uo pipefail

base=${1:?"name a base: books, recall or books-gpu; see the head of this file"}
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
config=configs/compare/$base.yaml
variants=configs/compare/variants.txt
runs=${RUNS:-runs/compare}/$base
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $base in
    *-gpu) seeds=${SEEDS:-0 1 2} ;;
    *) seeds=${SEEDS:-0} ;;
esac

fail() { echo "error: $*" >&2; exit 2; }
[ -f "$config" ] || fail "there is no $config"
names=() failed=() finished=() data=()
while read -ra words; do
    [[ ${#words[@]} = 0 || ${words[0]} = \#* ]] || names+=("${words[0]}")
done <"$variants"
for name in "$@"; do
    [[ " ${names[*]} " = *" $name "* ]] || fail "there is no variant $name in $variants; there are ${names[*]}"
done

valid=$("$python" -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["data"]["valid_path"])' "$config")
if [[ $valid = synthetic:* ]]; then
    result=recall.json
else
    result=evaluation.json
    if [ -n "${DATA:-}" ]; then
        valid=$DATA/valid
        vocabulary=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["vocab_size"])' \
            "$valid/manifest.json") || fail "$valid is no prepared folder"
        data=(data.path="$DATA/train" data.valid_path="$valid" model.vocab_size="$vocabulary")
    fi
    [ -f "$valid/manifest.json" ] || fail "$valid is no prepared folder; make data makes the demo's"
fi

while read -ra words <&3; do
    [[ ${#words[@]} = 0 || ${words[0]} = \#* ]] && continue
    name=${words[0]}
    [[ $# = 0 || " $* " = *" $name "* ]] || continue
    for seed in $seeds; do
        run=$runs/$name-$seed
        echo "== $run"
        [ -f "$run/summary.json" ] ||
            "$python" launch/pretrain.py --config "$config" "${data[@]}" "${words[@]:1}" run.dir="$run" run.seed="$seed" ||
            { failed+=("$name-$seed"); continue; }
        [ -f "$run/$result" ] ||
            "$python" tools/evaluate.py --checkpoint "$run" --data "$valid" --batch 8 --output "$run/$result" ||
            failed+=("$name-$seed")
        finished+=("$run")
    done
done 3<"$variants"

[ ${#finished[@]} = 0 ] || { echo; "$python" tools/compare.py "${finished[@]}" --output "$runs/comparison"; }
[ ${#failed[@]} = 0 ] || { echo "error: failed: ${failed[*]}" >&2; exit 1; }
