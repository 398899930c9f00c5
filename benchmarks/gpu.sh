#!/usr/bin/env bash
# All that these tables owe to a GPU, one line of progress a part: bash benchmarks/gpu.sh PEERS OUT
#
# PEERS holds the checkouts mae, LatentMIM, dino and davis2017-evaluation (see README.md); OUT receives a log and a
# JSON file of each part. lmim_bench must be importable. A part that fails, or takes too long, is said at the end and
# stops none of the others; the order is that of their worth, for a machine that is lent for ten minutes.
set -u
here=$(cd "$(dirname "$0")" && pwd)
peers=$(cd "$1" && pwd) && mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
cd "$here/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
"$python" -c "import lmim_bench" || { echo "install the project first: pip install ."; exit 2; }
failed=()

part() {
    local name=$1 seconds=$2 begun=$SECONDS
    shift 2
    if timeout "$seconds" "$python" "$@" >"$out/$name.log" 2>&1; then state=done; else state=FAILED failed+=("$name"); fi
    echo "$name: $state in $((SECONDS - begun)) s"
}

part tests 120 -m pytest -q -m gpu tests/bench/test_gpu.py tests/pretrain/test_replay.py
part pretrain 180 benchmarks/pretrain_throughput.py --peers "$peers" --repeats 3 --profile --json "$out/pretrain.json"
part pretrain-graph 120 benchmarks/pretrain_throughput.py --peers "$peers" --set engine.cuda_graph=true --repeats 3 \
    --json "$out/pretrain-graph.json"
part video 120 benchmarks/video_end_to_end.py --peers "$peers" --precision bf16 --sequences 2 --rounds 1 \
    --json "$out/video.json"
part reading 90 benchmarks/reading.py --images 8192 --rounds 3 --json "$out/reading.json"
for model in small base large; do
    for kept in "" --kept; do
        part "features-$model$kept" 120 benchmarks/features.py --model "vit_${model}_patch16_224" --jpeg $kept \
            --precision bf16 --images 16384 --rounds 2 --json "$out/features-$model$kept.json"
    done
done
part pretrain-plain 120 benchmarks/pretrain_throughput.py --peers "$peers" --set engine.compile=off --repeats 3 \
    --json "$out/pretrain-plain.json"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; see the logs in $out"; exit 1; }
