#!/bin/sh
# The three ways to ask with curl. Needs a running server: softvllm serve
#   SOFTVLLM_URL=http://127.0.0.1:8000 SOFTVLLM_API_KEY=... sh curl.sh
set -eu
url=${SOFTVLLM_URL:-http://127.0.0.1:8000}
url=${url%/}
key=${SOFTVLLM_API_KEY:-EMPTY}

ask() { # ask ROUTE JSON: the response, as it arrives; an error response ends the script
    curl --fail-with-body --silent --show-error --no-buffer "$url$1" \
        -H "Authorization: Bearer $key" -H "Content-Type: application/json" -d "$2"
}

listing=$(curl --fail-with-body --silent --show-error "$url/v1/models" -H "Authorization: Bearer $key")
model=$(printf '%s' "$listing" | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')

echo "--- soft, in one piece: message.reasoning, message.content and the cot block"
ask /v1/chat/completions '{
    "model": "'"$model"'",
    "messages": [{"role": "user", "content": "What is 7 plus 5?"}],
    "max_tokens": 96,
    "cot_mode": "soft",
    "cot": {"seed": 7, "max_think_tokens": 48}
}'

printf '\n\n%s\n' "--- soft, streamed, with the top 3 tokens of each think step"
ask /v1/chat/completions '{
    "model": "'"$model"'",
    "messages": [{"role": "user", "content": "What is 7 plus 5?"}],
    "max_tokens": 96,
    "stream": true,
    "cot_mode": "soft",
    "cot": {"seed": 7, "max_think_tokens": 48, "record": "top", "record_top": 3}
}'

# Rollouts come as binary frames (docs/wire.md): save them here, read them with
# softvllm.core.rollout.read_frames, or ask with SoftClient.rollouts instead.
out=$(mktemp)
trap 'rm -f "$out"' EXIT
printf '\n%s\n' "--- rollouts: 2 prompts x 4 samples, with traces"
ask /v1/rollouts '{
    "prompts": [{"prompt": "7 plus 5 is"}, {"messages": [{"role": "user", "content": "7 + 5?"}]}],
    "n": 4,
    "seed": 1,
    "cot_mode": "soft",
    "cot": {"max_think_tokens": 16},
    "sampling": {"max_tokens": 48}
}' > "$out"
echo "$(wc -c < "$out") bytes of frames"
