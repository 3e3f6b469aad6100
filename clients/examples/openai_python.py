"""The plain `openai` client: what differs is `extra_body`, and two fields that come back.

pip install openai
SOFTVLLM_URL=http://127.0.0.1:8000 python openai_python.py
"""

import os

from openai import OpenAI

url = os.environ.get("SOFTVLLM_URL", "http://127.0.0.1:8000").rstrip("/")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SOFTVLLM_API_KEY", "EMPTY"))
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is 7 plus 5?"}]

reply = client.chat.completions.create(
    model=model,
    messages=question,
    max_tokens=96,
    extra_body={"cot_mode": "soft", "cot": {"max_think_tokens": 48}},
)
choice = reply.choices[0]
print("thought: ", choice.message.reasoning)
print("answered:", choice.message.content)
print("how:     ", choice.cot)

# The same sample once more, streamed: its seed repeats it.
stream = client.chat.completions.create(
    model=model,
    messages=question,
    max_tokens=96,
    stream=True,
    extra_body={
        "cot_mode": "soft",
        "cot": {
            "max_think_tokens": 48,
            "seed": choice.cot["seed"],
            "record": "top",
            "record_top": 3,
        },
    },
)
for chunk in stream:
    for part in chunk.choices:
        for step in (getattr(part, "cot", None) or {}).get("steps", ()):
            top = "  ".join(f"{token!r} {weight:.2f}" for token, _, weight in step["top"])
            print(f"  entropy {step['entropy']:.2f}  {top}")
        if part.delta.content:
            print(part.delta.content, end="", flush=True)
print()
