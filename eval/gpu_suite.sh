#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one run: correctness of the kernels, then speed, then training.
#
#   eval/gpu_suite.sh OUTPUT_DIR [correctness] [operator] [models] [train]      (all four when none is named)
#
# Needs torch with CUDA, triton, diffusers and the package's other requirements importable from this checkout. With
# fla-core installed (`pip install --no-deps fla-core einops`) the operator is also timed beside its nearest kernel.
# PYTHON chooses the interpreter, TRAIN_SECONDS bounds the training of each stage (default 420), RESOLUTION its size
# (default 512). Results are JSON and logs in OUTPUT_DIR; a step that fails is named at the end and fails the suite.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: eval/gpu_suite.sh OUTPUT_DIR [correctness] [operator] [models] [train]}
shift
steps=${*:-correctness operator models train}
python=${PYTHON:-python3}
mkdir -p "$output"
output=$(cd "$output" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA GPU"; print(torch.cuda.get_device_name())' || exit 2
failed=()
throughput=("$python" -m flatten_eval throughput --dtype bfloat16 --fewer --device cuda --offline)

step() { # name, command ...
  local name=$1
  shift
  echo "== $name: $*"
  if ! "$@" >"$output/$name.log" 2>&1; then
    failed+=("$name")
    tail -n 15 "$output/$name.log"
  fi
}

operator() { # heads head_dim tokens...
  local heads=$1 head_dim=$2
  shift 2
  step "operator_h${heads}d${head_dim}" "${throughput[@]}" --op --batch-size 2 --rounds 20 --warmup 3 \
    --heads "$heads" --head-dim "$head_dim" --feature-maps --window 8 --public --tokens "$@" \
    --json "$output/operator_h${heads}d${head_dim}.json"
}

for part in $steps; do
  case $part in
    correctness)
      step correctness "$python" -m pytest -q tests/gpu -p no:cacheprovider
      ;;
    operator)
      operator 8 40 4096 16384 65536
      for head_dim in 64 72 128; do operator 16 "$head_dim" 4096 16384 65536; done
      step operator_backward "${throughput[@]}" --op --batch-size 2 --rounds 20 --warmup 3 --tokens 16384 --backward \
        --json "$output/operator_backward.json"
      ;;
    models)
      for arch in sd15 sdxl pixart; do # "auto" must not be slower than softmax at any size
        step "auto_$arch" "${throughput[@]}" --arch "$arch" --sizes 256 512 1024 2048 --min-tokens auto \
          --json "$output/auto_$arch.json"
      done
      for arch in sd15 sdxl pixart; do
        step "throughput_$arch" "${throughput[@]}" --arch "$arch" --sizes 1024 2048 4096 --rounds 5 \
          --json "$output/throughput_$arch.json" --plot "$output/throughput_$arch.png"
      done
      for window in 0 8; do # joint attention, without and with windows
        step "throughput_sd3_window$window" "${throughput[@]}" --arch sd3 --sizes 1024 2048 \
          --window "$window" --rounds 5 --json "$output/throughput_sd3_window$window.json"
      done
      ;;
    train)
      step train_scenes "$python" -m eval.experiments.train_scenes --output_dir "$output/scenes" --mixed_precision bf16 \
        --resolution "${RESOLUTION:-512}" --max_train_seconds "${TRAIN_SECONDS:-420}" --train_batch_size 64 \
        --vae_crop 128 --vae_batch_size 32 --num_scenes 40000 --max_train_steps 100000 --vae_train_steps 100000
      ;;
    *)
      echo "unknown part '$part': use correctness, operator, models, train" >&2
      exit 2
      ;;
  esac
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $output)"
  exit 1
fi
echo "all passed; results in $output"
