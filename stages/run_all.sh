#!/usr/bin/env bash
# The whole pipeline, read top to bottom: raw files -> tokenizers -> shards -> six stages -> LoRA -> a checkpoint
# that anytoken.load opens.
#
#   stages/run_all.sh           builds the sets from their packages and trains for hours on two cores
#   stages/run_all.sh --tiny    the same path on tests/assets/tiny, in minutes: shows that it works, learns little
#
# Every step goes on where it was stopped, and is skipped where its output is complete.
# Environment: DATA (raw sets), RUNS (everything that is made), WORKERS, and with --tiny STEPS (of each training).
# Relative paths start at the repository's root. `python` is the one on PATH: activate the environment first.
set -euo pipefail
cd "$(dirname "$0")/.."

tiny=""
[ "${1:-}" = "--tiny" ] && tiny=yes
[ $# -le 1 ] && { [ $# -eq 0 ] || [ "$tiny" ]; } || { echo "usage: stages/run_all.sh [--tiny]" >&2; exit 2; }
DATA=${DATA:-$([ "$tiny" ] && echo tests/assets/tiny || echo data/sets)}
RUNS=${RUNS:-$([ "$tiny" ] && echo runs/tiny || echo runs)}
WORKERS=${WORKERS:-2}
say() { printf '\n== %s\n' "$*"; }
anytoken() { python -m anytoken "$@"; }

# --tiny shrinks sizes and steps, never the path.
codec_tiny=() instruct_tiny=() stage_tiny=() first_tiny=() speech_tiny=()
if [ "$tiny" ]; then
  codec_tiny=(steps="${STEPS:-40}" batch_size=8 config.width=64 config.encoder_depth=1 config.decoder_depth=1)
  instruct_tiny=(--count 400)
  stage_tiny=(steps="${STEPS:-40}" tokens_per_batch=2048 schedule.warmup_steps=5 save_every=20 log_every=5
    eval.every=0 eval.batches=1)
  first_tiny=(model.hidden_size=64 model.num_hidden_layers=2 model.num_attention_heads=2 model.head_dim=32
    model.moe_intermediate_size=96 model.shared_expert_intermediate_size=96)
  speech_tiny=(eval.data.0.pair_with.split=null) # so few clips: no held-out one may be of a held-out picture
fi

if [ ! "$tiny" ]; then
  say "raw sets"
  for name in emoji speech dna; do anytoken data $name --out "$DATA"; done
fi

say "tokenizers"
tokenizers=()
for name in text image speech video dna; do
  case $name in
    text | dna) shrink=() ;; # they take seconds as they are, and DNA's is lossless or not saved
    *) shrink=("${codec_tiny[@]}") ;;
  esac
  anytoken tokenizer train tokenizers/$name/recipe.yaml --data "$DATA" --out "$RUNS/tokenizers/$name" "${shrink[@]}"
  tokenizers+=("tokenizers.$name=$RUNS/tokenizers/$name")
done

say "shards: every file tokenized once"
anytoken data instruct --sets "$DATA" --out "$RUNS/conversations" "${instruct_tiny[@]}"
for file in emoji/images emoji/videos emoji/joint speech/speech speech/varied dna/translate dna/coding; do
  anytoken data tokenize "$DATA/$file.jsonl" --tokenizers "$RUNS/tokenizers" --workers "$WORKERS" \
    --out "$RUNS/shards/$(basename $file)"
done
anytoken data tokenize "$RUNS/conversations/conversations.jsonl" --tokenizers "$RUNS/tokenizers" \
  --workers "$WORKERS" --out "$RUNS/shards/conversations" --data-root "$DATA"

say "stages"
stage() { # NAME [overrides]: from raw weights or the last stage's output
  local name=$1
  shift
  anytoken train "stages/$name.yaml" output="$RUNS/$name" data_root="$RUNS/shards" "$@" "${stage_tiny[@]}"
}
stage 1_alignment "${tokenizers[@]}" "${first_tiny[@]}"
stage 2_interleaved init_from="$RUNS/1_alignment"
stage 3_speech init_from="$RUNS/2_interleaved" "${speech_tiny[@]}"
stage 4_instruct init_from="$RUNS/3_speech"
stage 5_more init_from="$RUNS/4_instruct"

say "speech anew: half as many codes a second, and what holds speech tokenized with them"
next=$RUNS/next # the other tokenizers and shards, and those that change
mkdir -p "$next/tokenizers" "$next/shards"
anytoken tokenizer train tokenizers/speech/25hz/recipe.yaml --data "$DATA" --out "$next/tokenizers/speech" \
  "${codec_tiny[@]}"
for name in text image video dna; do ln -sfn "../../tokenizers/$name" "$next/tokenizers/$name"; done
for name in images videos joint translate; do ln -sfn "../../shards/$name" "$next/shards/$name"; done
for file in "$DATA"/speech/speech "$DATA"/speech/varied "$RUNS"/conversations/conversations; do
  anytoken data tokenize "$file.jsonl" --tokenizers "$next/tokenizers" --workers "$WORKERS" \
    --data-root "$DATA" \
    --out "$next/shards/$(basename "$file")"
done
stage 6_speech init_from="$RUNS/5_more" data_root="$next/shards" replace_tokenizers.speech="$next/tokenizers/speech"

anytoken train stages/lora.yaml init_from="$RUNS/6_speech" output="$RUNS/lora" \
  data.train="$next/shards/conversations" "${stage_tiny[@]}"

say "done: anytoken.load('$RUNS/6_speech'), adapter '$RUNS/lora'"
python - "$RUNS/6_speech" <<'PY'
import sys

import anytoken

reply = anytoken.load(sys.argv[1]).generate("a red apple", output="image", seed=0)
print(reply.images[0])
PY
