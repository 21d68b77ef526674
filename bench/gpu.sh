#!/usr/bin/env bash
# All measurements that want a GPU, within ten minutes on one machine.
#
#   bench/gpu.sh                     everything, on the GPU
#   bench/gpu.sh --only=epoch,stored some of it
#   bench/gpu.sh --miniature         everything, tiny, on the CPU: does it run?
#
# Needs Python 3.11 or later with JAX (and its CUDA plugin), Flax, Optax, Orbax and, for
# the peers, PyTorch; no internet. Packages that such a machine may lack travel as wheels
# in bench/wheels/; fetch them where there is internet, for its Python and processor:
#
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
#       --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#       -d bench/wheels grain array_record ml_collections platformdirs \
#       importlib_resources
#
# Writes into $OUT (default runs/gpu): results.jsonl, one line per measurement;
# overhead.json; status.txt; log.txt; nvidia-smi.txt. A measurement that fails or takes
# too long does not stop the others; the exit status is then 1. PYTHON names the
# interpreter (default python3), SECONDS_IN_ALL the time for everything (default 570).
set -u

cd "$(dirname "$0")/.." || exit 2

miniature=
only=step_cifar,step_imagenet,epoch,recipe,overhead,stored
for argument in "$@"; do
  case $argument in
    --miniature) miniature=yes ;;
    --only=*) only=${argument#--only=} ;;
    *)
      echo "bench/gpu.sh: unknown argument $argument; see the head of the file" >&2
      exit 2
      ;;
  esac
done
for name in ${only//,/ }; do
  case $name in
    step_cifar | step_imagenet | epoch | recipe | overhead | stored) ;;
    *)
      echo "bench/gpu.sh: --only knows step_cifar, step_imagenet, epoch, recipe," \
        "overhead and stored, not $name" >&2
      exit 2
      ;;
  esac
done

python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
end=$((SECONDS + ${SECONDS_IN_ALL:-570}))
failed=
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
: >"$out/results.jsonl"
: >"$out/log.txt"
: >"$out/status.txt"
export PYTHONUNBUFFERED=1

if compgen -G "bench/wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$site" bench/wheels/*.whl >>"$out/log.txt" 2>&1 \
    || echo "wheels: pip failed, see log.txt" | tee -a "$out/status.txt"
  export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
else
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

# measure NAME SECONDS COMMAND...: runs one of them, if it is wanted and there is time.
measure() {
  local name=$1 limit=$2 left=$((end - SECONDS)) begin=$SECONDS status
  shift 2
  case ,$only, in *,"$name",*) ;; *) return ;; esac
  if ((left < 20)); then
    echo "$name: no time left" | tee -a "$out/status.txt"
    failed=yes
    return
  fi
  ((limit > left)) && limit=$left
  echo "== $name: $*" >>"$out/log.txt"
  timeout --kill-after=10 "$limit" "$python" "$@" \
    >>"$out/results.jsonl" 2>>"$out/log.txt"
  status=$?
  case $status in
    0) echo "$name: done in $((SECONDS - begin)) s" ;;
    124 | 137) echo "$name: stopped after $limit s, see log.txt" ;;
    *) echo "$name: failed with status $status, see log.txt" ;;
  esac | tee -a "$out/status.txt"
  ((status == 0)) || failed=yes
}

if [[ -n $miniature ]]; then
  tiny="--teacher=resnet8 --student=resnet8 --batch-size=2 --image-size=8"
  tiny="$tiny --steps=2 --rounds=1 --peer=none"
  pair="--pair=resnet8-resnet8"
  measure step_cifar 120 bench/step.py $tiny --steps-per-call=2
  measure step_imagenet 120 bench/step.py --pair=imagenet $tiny --classes=3
  measure epoch 120 bench/epoch.py $pair --width=0.25 --records=16 \
    --test-records=8 --batch-size=8 --rounds=1
  measure recipe 120 bench/epoch.py --recipe=cifar100-kd $pair --width=0.25 \
    --records=16 --test-records=8 --batch-size=8 --epochs=3
  measure overhead 120 bench/overhead.py $pair --methods=dkd --batch-size=8 \
    --records=16 --steps=1 --rounds=1 --out="$out/overhead.json"
  measure stored 120 bench/stored.py --miniature
else
  nvidia-smi >"$out/nvidia-smi.txt" 2>&1
  gpu="--device=gpu --precision=bfloat16"
  measure step_cifar 130 bench/step.py $gpu --pair=cifar --steps=200 \
    --steps-per-call=50
  measure step_imagenet 200 bench/step.py $gpu --pair=imagenet --steps=20 \
    --steps-per-call=10 --rounds=5 --peer=torch,torch_compile
  measure recipe 100 bench/epoch.py $gpu --recipe=cifar100-kd --epochs=30
  measure stored 90 bench/stored.py $gpu
  measure epoch 60 bench/epoch.py $gpu --rounds=3
  measure overhead 160 bench/overhead.py $gpu --compile-workers=8 --seconds=100 \
    --steps=100 --steps-per-call=10 --rounds=3 --out="$out/overhead.json" \
    --methods=none,dkd,dist,lskd,mlld,at,fitnet,reviewkd,rkd,crd,simkd,vid,sp,ofd,srrl
  nvidia-smi >>"$out/nvidia-smi.txt" 2>&1
fi

cat "$out/results.jsonl"
echo "--- status" >&2
cat "$out/status.txt" >&2
[[ -z $failed ]]
