#!/usr/bin/env bash
# The day after: a day of events and the new catalogue in, only what changed is worked on.
#
#   day2.sh NEW_ITEMS DAY_EVENTS YESTERDAY TODAY
#
# YESTERDAY and TODAY are folders of outputs (events, emb, sid, uemb and, in ../models, the user model). The log
# is appended by links, unchanged items keep their vectors, published SIDs stay, and only users with new or late
# events are computed again. TODAY equals what a full run over everything would write.
set -euo pipefail
ITEMS=$1 DAY=$2 YESTERDAY=$3 TODAY=$4 MODELS=${MODELS:-$(dirname "$4")/models}
AS_OF=${AS_OF:-$(date -u +%F)}
mkdir -p "$TODAY"

prerank data partition "$DAY" --append-to "$YESTERDAY/events" -o "$TODAY/events"
prerank embed items "$ITEMS" --previous "$YESTERDAY/emb" -o "$TODAY/emb"
prerank quantize sid "$TODAY/emb" --codebook "$MODELS/codebook" --previous "$YESTERDAY/sid" -o "$TODAY/sid"
prerank embed users --events "$TODAY/events" --embeddings "$TODAY/emb" --model "$MODELS/user_model" \
  --as-of "$AS_OF" --previous "$YESTERDAY/uemb" -o "$TODAY/uemb"
prerank inspect "$TODAY/emb" --compare-to "$YESTERDAY/emb"
