#!/usr/bin/env bash
# Proves and measures safekern on one NVIDIA GPU, in one command and under 9 minutes:
#
#   bash benchmarks/gpu_check.sh              # results go to ${OUT:-benchmarks/results}/gpu
#   bash benchmarks/gpu_check.sh --dry-run    # no GPU: the same Python code with tiny sizes on the CPU, nothing built
#
# Needs torch 2.11+ for CUDA, nvcc, Triton, transformers, pytest, pytest-xdist and hypothesis; no network. Builds the kernels in a
# scratch copy of the tree. A stage that fails is named in the table, does not stop the later ones, and makes the status 1; what was
# skipped is called so, with the reason.
#
# Options, as environment variables: OUT (folder), NUMEL (weights of the kernel benchmarks), SIZES (of the models:
# "1b 8b"), SECONDS_IN_ALL (budget), PYTHON.
set -uo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$here/benchmarks/results}/gpu
numel=${NUMEL:-1000000000}
read -r -a sizes <<<"${SIZES:-1b 8b}"
deadline=$((SECONDS + ${SECONDS_IN_ALL:-515}))
device=cuda
case ${1:-} in
  --dry-run) device=cpu ;;
  "") ;;
  *)
    echo "usage: benchmarks/gpu_check.sh [--dry-run]" >&2
    exit 2
    ;;
esac

mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
stages=$out/stages.tsv
rm -f "$out"/{log.txt,stages.tsv,doctor.json,kernels.csv,models.csv,long_batches.csv,table.txt}
scratch=$(mktemp -d)
background=()
cleanup() {
  for process in "${background[@]}"; do kill "$process" 2>/dev/null; done
  rm -rf "$scratch"
}
trap cleanup EXIT

# note STAGE RESULT SECONDS DETAIL: a line of the table.
note() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" | tee -a "$stages"
}

# verdict STATUS FILE: what a stage came to; its detail is the last line it printed. Of pytest, tests that were all
# skipped are not passed.
verdict() {
  detail=$(grep -v '^[[:space:]]*$' "$2" | tail -n 1 | cut -c 1-120)
  case $1 in
    0)
      result=passed
      if [[ $detail =~ [0-9]+\ (skipped|deselected) && ! $detail =~ [0-9]+\ passed ]]; then result=skipped; fi
      ;;
    124 | 137) result="timed out" ;;
    *) result=failed ;;
  esac
}

# stage NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds, and less where less is left.
stage() {
  local name=$1 limit=$2 begin=$SECONDS said result detail
  shift 2
  if [ $((deadline - SECONDS)) -lt "$limit" ]; then limit=$((deadline - SECONDS)); fi
  if [ "$limit" -lt 10 ]; then
    note "$name" "no time" 0 "the budget was used up before it"
    return
  fi
  said=$(mktemp -p "$scratch")
  # As with Ctrl-C, after which pytest still says what passed and what failed.
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$said" 2>&1
  verdict $? "$said"
  { printf '\n===== %s: %s\n' "$name" "$*" && cat "$said"; } >>"$log"
  note "$name" "$result" $((SECONDS - begin)) "$detail"
}

build() {
  local arch
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  stage build 240 env -C "$tree" SAFEKERN_REQUIRE_KERNELS=1 TORCH_CUDA_ARCH_LIST="$arch" MAX_JOBS="${MAX_JOBS:-16}" \
    "$python" setup.py -q build_ext --inplace --build-temp "$scratch/build"
}

tests() {
  # Few threads: test runs that each take all cores wait for one another at every step. Compiling takes most of the
  # time, so where pytest-xdist is installed, several processes share the tests of a GPU.
  local shared=()
  if [ $device = cuda ] && "$python" -c 'import xdist' 2>/dev/null; then shared=(-n 4); fi
  # Most of the tests are of the ops, and skipped without it.
  if ! "$python" -c 'import hypothesis' 2>/dev/null; then
    note "tests $1" failed 0 "hypothesis is not installed"
    return
  fi
  stage "tests $1" "$2" env -C "$3" PYTHONPATH="$3" SAFEKERN_BACKEND="$1" SAFEKERN_TEST_DEVICE=$device \
    OMP_NUM_THREADS=2 "$python" -X faulthandler -m pytest -q --full -p no:cacheprovider -p no:benchmark "${shared[@]}" \
    -W "ignore:safekern runs on its:UserWarning" --rootdir "$3" -c "$3/pyproject.toml" "$3/tests/gpu"
}

# A few cases per op: under a sanitizer a kernel takes many times as long.
sanitized='
import itertools, sys, torch
from safekern import diagnosis, ops
from safekern.ops.registry import OPS
wrong = 0
for name, op in OPS.items():
    for case in itertools.islice(diagnosis._made_on_cpu(op.cases(False)), 3):
        problem = diagnosis._problem(op, case, torch.device("cuda"), 11)
        if problem:
            wrong += 1
            print(name, case.name, problem)
# Many enough for select to sample them, and for a second round where sigma combines its chunks.
scores = [torch.randn(2**24 + 5, device="cuda")]
(chosen,) = ops.select(scores, torch.ones(1, device="cuda"), 10**5, True)
wrong += len(chosen) != 10**5 or not torch.isclose(ops.sigma(scores), torch.ones((), device="cuda"), rtol=1e-2).all()
print(f"{len(OPS)} ops, {wrong} wrong")
sys.exit(wrong > 0)
'

# The doctor, with its JSON in a file.
diagnosed='
import contextlib, json, sys
from pathlib import Path
from safekern.cli import main
path = Path(sys.argv[1])
with path.open("w") as file, contextlib.redirect_stdout(file):
    status = main(["doctor", "--json"])
checks = json.loads(path.read_text())["selftest"]
counts = {result: sum(check["status"] == result for check in checks) for result in ("passed", "failed", "skipped")}
print("ops compared with the reference:", ", ".join(f"{count} {result}" for result, count in counts.items() if count))
sys.exit(status)
'

sanitize() {
  local program name="$1 $2"
  program=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
  if [ -z "$program" ]; then
    note "$name" skipped 0 "no compute-sanitizer on PATH or in CUDA_HOME/bin"
    return
  fi
  stage "$name" 60 env -C "$tree" PYTHONPATH="$tree" SAFEKERN_BACKEND="$2" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$program" --tool "$1" --error-exitcode 99 --print-limit 20 "$python" -c "$sanitized"
}

tree=$here
if [ $device = cpu ]; then
  backends=(cpu torch)
  numel=500000
  sizes=(tiny)
  note build skipped 0 "dry run"
  for backend in "${backends[@]}"; do tests "$backend" 200 "$tree"; done
  for tool in memcheck racecheck; do note "$tool" skipped 0 "dry run"; done
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  backends=(cuda triton)
  tree=$scratch/tree
  mkdir "$tree"
  tar -C "$here" --exclude=./.git --exclude=./build --exclude='*.so' --exclude=__pycache__ -cf - . |
    tar -C "$tree" -xf -
  # Triton needs nothing built: its tests run from a copy of their own, beside the build and the other tests. Nothing is
  # timed until they have ended.
  cp -r "$tree" "$scratch/plain"
  tests triton 250 "$scratch/plain" &
  background+=($!)
  build
  # Its tests of large tensors may wait a minute each for memory that those of Triton hold.
  tests cuda 200 "$tree"
  sanitize memcheck cuda
  sanitize racecheck cuda
  wait
else
  backends=()
  note device failed 0 "PyTorch sees no CUDA device; --dry-run tries the scripts without one"
fi

# Python looks for modules where it is started, before PYTHONPATH.
cd "$tree" || exit 1
export PYTHONPATH=$tree
if [ ${#backends[@]} -gt 0 ]; then
  kernel_options=(--device "$device" --numel "$numel" --backends "${backends[@]}" --out "$out/kernels.csv")
  model_options=(--device "$device" --sizes "${sizes[@]}" --out "$out/models.csv")
  if [ $device = cpu ]; then
    kernel_options+=(--side 128 --repeats 3)
    model_options+=(--steps 3 --tokens 2 16)
  fi
  stage kernels 115 "$python" "$tree/benchmarks/gpu_kernels.py" "${kernel_options[@]}"
  stage models 130 "$python" "$tree/benchmarks/gpu_models.py" "${model_options[@]}"
  # Thousands of tokens in a batch, as in training.
  if [ $device = cuda ]; then
    stage "long batches" 60 "$python" "$tree/benchmarks/gpu_models.py" --device cuda --sizes 1b --tokens 4 1024 \
      --out "$out/long_batches.csv"
  fi
  stage doctor 150 "$python" -X faulthandler -c "$diagnosed" "$out/doctor.json"
fi

# The table comes last, and in a file of its own.
"$python" -W ignore - "$out" <<'PYTHON' 2>&1 | tee "$out/table.txt"
import csv
import sys
from pathlib import Path

from safekern.tables import Table

out = Path(sys.argv[1])


def records(name, **layout):
    path = out / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, **layout))


def show(name, columns):
    if rows := records(name):
        print(f"{Table.from_records(rows, columns)}\n")


show("kernels.csv", ["backend", "op", "contender", "ms", "device_ms", "ms_8b", "GB/s", "of_copy", "times_ours"])
for name in ("models.csv", "long_batches.csv"):
    show(name, ["model", "tokens", "backend", "stage", "seconds", "peak_GB", "above_GB", "note"])
for row in [*records("kernels.csv"), *records("models.csv")][:1]:
    print(f"measured on {row['device']}")
columns = ["stage", "result", "seconds", "detail"]
print(Table.from_records(records("stages.tsv", fieldnames=columns, delimiter="\t"), columns))
PYTHON
if grep -qP '^[^\t]*\t(failed|timed out|no time)\t' "$stages"; then exit 1; fi
