#!/usr/bin/env bash
# How the tables of results/README.md were read: results/read.sh DATA_DIR RUN RULE [RULE ...]
# Options are chosen on the tune domains of "corpus". "fresh" has the five domains that no trial read.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 run=$2
shift 2
for dataset in corpus fresh; do
    python adapt.py "$run" --data_dir "$data" --dataset $dataset --passages 8 --rules "$@"
done
