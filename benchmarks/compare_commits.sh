#!/usr/bin/env bash
# Runs `safekern bench` at two commits, one after the other, and says which of safekern's ops became slower.
#
#   benchmarks/compare_commits.sh OLD NEW [options of safekern bench]
#
# Both are built in worktrees of their own, with the Python that is active, which needs torch and setuptools.
set -euo pipefail
old=$1 new=$2
shift 2

scratch=$(mktemp -d)
trap 'git worktree remove --force "$scratch/old"; git worktree remove --force "$scratch/new"; rm -rf "$scratch"' EXIT
for which in old new; do
  git worktree add --quiet --detach "$scratch/$which" "${!which}"
  (cd "$scratch/$which" && python setup.py -q build_ext --inplace)
done
for which in old new; do
  (cd "$scratch/$which" && python -m safekern bench "$@" --out "$scratch/$which.csv")
done
python -m safekern bench --compare "$scratch/old.csv" "$scratch/new.csv"
