#!/usr/bin/env bash
# All CUDA figures, the most important first, one log per command: bash benchmarks/gpu.sh FOLDER [PROMPTS IFEVAL BASES]
#
# With the last three files (see `python -m benchmarks.real_study --help`) the study on a real model runs too. A command that fails
# does not stop the others; the script fails at its end if one did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?a folder for the logs}
mkdir -p "$out"
failed=0

measure() {
    local name=$1 limit=$2
    shift 2
    echo "==> [${SECONDS}s] $*"
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || { failed=1; echo "    failed: $out/$name.txt"; }
}

measure tests 120 python -m pytest -m gpu -q
measure attention 120 python -m benchmarks.attention --device cuda
measure step 180 python -m benchmarks.step --device cuda --size 1b
measure compile 240 python -m benchmarks.compile --device cuda --size 1b
measure decoding 120 python -m benchmarks.decoding --device cuda --size 1b
if [ $# -ge 4 ]; then
    for model in smollm2 gemma3; do
        measure "real_study_$model" 900 python -m benchmarks.real_study --size full --device cuda --model "$model" \
            --prompts "$2" --ifeval "$3" --bases "$4" --folder "$out/real_study_$model" --markdown "$out/real_study_$model.md"
    done
fi
exit $failed
