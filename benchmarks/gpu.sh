#!/usr/bin/env bash
# All CUDA figures, the most important first, one log per command: bash benchmarks/gpu.sh FOLDER [PROMPTS IFEVAL BASES]
#
# With the last three files (see `python -m benchmarks.real_study --help`) the study on a real model runs too. A command that fails
# does not stop the others; the script fails at its end if one did. DRY_RUN=1 runs the same commands on a CPU, at their quick sizes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?a folder for the logs}
mkdir -p "$out"
failed=0
if [ "${DRY_RUN:-}" ]; then
    run=(--device cpu --quick) large=(--size tiny) study=(--device cpu --quick) patience=10
else
    run=(--device cuda) large=(--size 1b) study=(--device cuda --size full) patience=1
fi

measure() {
    local name=$1 limit=$(($2 * patience))
    shift 2
    echo "==> [${SECONDS}s] $*"
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || { failed=1; echo "    failed: $out/$name.txt"; }
}

measure tests 120 python -m pytest -m gpu -q
measure attention 120 python -m benchmarks.attention "${run[@]}"
measure step 180 python -m benchmarks.step "${run[@]}" "${large[@]}"
measure compile 240 python -m benchmarks.compile "${run[@]}" "${large[@]}"
measure decoding 120 python -m benchmarks.decoding "${run[@]}" "${large[@]}"
if [ $# -ge 4 ]; then
    for model in smollm2 gemma3; do
        base=()
        [ "$model" = gemma3 ] && base=(--chat_template benchmarks/real_study/gemma.jinja --eos_token "<end_of_turn>")
        measure "real_study_$model" 900 python -m benchmarks.real_study "${study[@]}" --model "$model" "${base[@]}" \
            --prompts "$2" --ifeval "$3" --bases "$4" --folder "$out/real_study_$model" --markdown "$out/real_study_$model.md"
    done
fi
exit $failed
