#!/usr/bin/env bash
# One night: items, log and requests in, dated outputs out. `current` moves only when everything is good.
#
#   nightly.sh ITEMS EVENTS REQUESTS ROOT [NIGHT]
#
# The first night trains: TRAIN_UNTIL and SCORE_UNTIL name the times until which the user model and the scorer learn.
# ROOT/NIGHT/ holds the night's outputs, ROOT/models/ what is fitted once and reused, ROOT/current the last good
# night. Run it again after a failure: what is finished is kept. Exit 3 means that an input or a gate refused;
# `current` still shows last night then.
set -euo pipefail
ITEMS=$1 EVENTS=$2 REQUESTS=$3 ROOT=$4 NIGHT=${5:-$(date -u +%F)}
KEEP=${KEEP:-7}          # nights that stay
MODEL=${MODEL:-tfidf}    # encoder of the first night; later nights use the stored one
now="$ROOT/$NIGHT" last="$ROOT/current" models="$ROOT/models"
mkdir -p "$now" "$models"

# Day-over-day gates and incremental work need a night before.
since=() items_before=() sids_before=() users_before=()
if [[ -e $last && $(readlink "$last") != "$NIGHT" ]]; then
  items_before=(--previous "$last/emb" --compare-to "$last/emb")
  sids_before=(--previous "$last/sid" --compare-to "$last/sid")
  users_before=(--previous "$last/uemb" --compare-to "$last/uemb")
  since=(--compare-to "$last/scores")
fi

prerank data validate "$ITEMS" --contract items
prerank data validate "$EVENTS" --contract events
prerank data partition "$EVENTS" -o "$now/events"

# The encoder and the codebook are fitted on the first night and reused: a second fit moves every ID.
if [[ ${#items_before[@]} -gt 0 ]]; then
  prerank embed items "$ITEMS" "${items_before[@]}" -o "$now/emb"
else
  prerank embed items "$ITEMS" --model "$MODEL" -o "$now/emb"
fi
if [[ ! -d $models/codebook ]]; then
  prerank train quantizer "$now/emb" -o "$models/codebook"
fi
prerank quantize sid "$now/emb" --codebook "$models/codebook" "${sids_before[@]}" -o "$now/sid"
prerank export vectors "$now/emb" --format int8 -o "$now/emb_int8"

# Models are trained when there are none; remove one to have it trained again tonight.
if [[ ! -d $models/user_model ]]; then
  prerank train user --events "$now/events" --embeddings "$now/emb" --until "$TRAIN_UNTIL" -o "$models/user_model"
fi
prerank embed users --events "$now/events" --embeddings "$now/emb" --model "$models/user_model" \
  --requests "$REQUESTS" "${users_before[@]}" -o "$now/uemb"
if [[ ! -d $models/scorer ]]; then
  prerank data requests "$now/events" --items "$ITEMS" --from "$TRAIN_UNTIL" --until "$SCORE_UNTIL" -o "$now/learn"
  prerank embed users --events "$now/events" --embeddings "$now/emb" --model "$models/user_model" \
    --requests "$now/learn" -o "$now/uemb_learn"
  prerank train scorer --requests "$now/learn" --events "$now/events" --items "$ITEMS" --embeddings "$now/emb" \
    --users "$now/uemb_learn" --until "$SCORE_UNTIL" -o "$models/scorer"
fi
prerank score --requests "$REQUESTS" --model "$models/scorer" --items "$ITEMS" --embeddings "$now/emb" \
  --users "$now/uemb" --events "$now/events" "${since[@]}" -o "$now/scores"

# A link is swapped by rename: a reader of `current` always finds a whole night.
ln -sfn "$NIGHT" "$ROOT/.current.new"
mv -T "$ROOT/.current.new" "$last"
find "$ROOT" -mindepth 1 -maxdepth 1 -type d -name '20*' | sort | head -n "-$KEEP" | xargs -r rm -rf
