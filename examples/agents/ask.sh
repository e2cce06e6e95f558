#!/usr/bin/env bash
# Asks the model to shout a word: ask.sh WORD
set -euo pipefail
curl --silent --fail "$OPENAI_BASE_URL/chat/completions" \
    --header "Authorization: Bearer $OPENAI_API_KEY" \
    --header "Content-Type: application/json" \
    --data "{\"model\": \"$OPENAI_MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"Shout: $1\"}]}"
