#!/usr/bin/env bash
# Throughput, TTFT and ITL of a running server at 1, 8 and 64 requests at once.
# usage: bash examples/serving/load_test.sh URL VIDEO...         MAX_OUTPUT_LENGTH and PYTHON may be set.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash load_test.sh URL VIDEO..." >&2; exit 2; }
url=$1
shift
for clients in 1 8 64; do
    echo "== $clients at once"
    "${PYTHON:-python}" -m atb_pllava bench serve --server "$url" --media "$@" --num_requests $((clients * 4)) \
        --max_concurrency "$clients" --max_output_length "${MAX_OUTPUT_LENGTH:-64}"
done
