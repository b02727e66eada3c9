#!/usr/bin/env bash
# Registers a video with a running server once, asks it several questions with curl, and deletes it.
# usage: bash examples/serving/ask_server.sh VIDEO QUESTION...   URL and ATB_PLLAVA_API_KEY may be set.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash ask_server.sh VIDEO QUESTION..." >&2; exit 2; }
url=${URL:-http://127.0.0.1:8000}
key="Authorization: Bearer ${ATB_PLLAVA_API_KEY:-EMPTY}"
video=$1
shift
# json FIELD...: a field of the JSON on stdin.
json() { python3 -c 'import json,sys; v=json.load(sys.stdin)
for k in sys.argv[1:]: v=v[int(k)] if isinstance(v,list) else v[k]
print(v)' "$@"; }

id=$(curl -sS --fail-with-body -H "$key" -F "file=@$video" "$url/v1/videos" | json id)
trap 'curl -sS -o /dev/null -X DELETE -H "$key" "$url/v1/videos/$id"' EXIT
for question in "$@"; do
    body=$(python3 -c 'import json,sys
video, question = sys.argv[1:]
print(json.dumps({"max_tokens": 200, "messages": [{"role": "user", "content": [
    {"type": "video", "video_id": video}, {"type": "text", "text": question}]}]}))' "$id" "$question")
    curl -sS --fail-with-body -H "$key" -H "Content-Type: application/json" -d "$body" "$url/v1/chat/completions" |
        json choices 0 message content
done
