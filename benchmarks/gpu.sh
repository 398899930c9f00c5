#!/usr/bin/env bash
# All that these tables owe to a GPU, one line of progress a part: bash benchmarks/gpu.sh PEERS OUT
#
# PEERS holds the checkouts mae, LatentMIM, dino and davis2017-evaluation (see README.md); OUT receives a log and a
# JSON file of each part. A part that fails is said at the end and stops none of the others.
set -u
here=$(cd "$(dirname "$0")" && pwd)
peers=$(cd "$1" && pwd) && mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
cd "$here/.." || exit 2
failed=()

part() {
    local name=$1 begun=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then state=done; else state=FAILED failed+=("$name"); fi
    echo "$name: $state in $((SECONDS - begun)) s"
}

part tests python -m pytest -q tests/bench/test_gpu.py
part pretrain python benchmarks/pretrain_throughput.py --peers "$peers" --json "$out/pretrain.json"
part pretrain-plain python benchmarks/pretrain_throughput.py --peers "$peers" --set engine.compile=off \
    --json "$out/pretrain-plain.json"
for model in small base; do
    part "features-$model" python benchmarks/features.py --model "vit_${model}_patch16_224" --jpeg --precision bf16 \
        --images 40000 --json "$out/features-$model.json"
done
part video python benchmarks/video_end_to_end.py --peers "$peers" --precision bf16 --json "$out/video.json"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; see the logs in $out"; exit 1; }
