#!/usr/bin/env bash
# A check of one's own model in CI: it trains a little, draws, and fails where its images are worse than they
# were. Needs nothing but `gz` on the path.
#   MODEL=ddpm DATA=mnist STEPS=2000 WORST=60 .ci/examples/check.sh
set -euo pipefail
MODEL=${MODEL:-vae} DATA=${DATA:-digits} STEPS=${STEPS:-200} WORST=${WORST:-2000} OUT=${OUT:-gz-check}
export GZ_TRIAL=0 # no step is tried beforehand: CI knows how long it takes

gz train "$MODEL" --data "$DATA" --steps "$STEPS" --name ci --requeue -q > /dev/null
gz sample ci -n 16 --seed 0 --out "$OUT/samples" -q
gz bench ci --data "$DATA" --metrics fd -n 200 --json > "$OUT/bench.json"
python3 - "$OUT/bench.json" "$WORST" << 'EOF'
import json
import sys

row = json.load(open(sys.argv[1]))["rows"][0]
fd = row["metrics"]["fd"]
print(f"{row['model']}: fd {fd:.1f}, at most {sys.argv[2]} is allowed")
sys.exit(fd > float(sys.argv[2]))
EOF
