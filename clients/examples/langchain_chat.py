"""LangChain's `ChatOpenAI`: a think phase for every call of a chain, by `extra_body`.

pip install langchain-openai
SOFTVLLM_URL=http://127.0.0.1:8000 python langchain_chat.py
"""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

url = os.environ.get("SOFTVLLM_URL", "http://127.0.0.1:8000").rstrip("/")
key = os.environ.get("SOFTVLLM_API_KEY", "EMPTY")
model = OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0].id

chat = ChatOpenAI(
    base_url=f"{url}/v1",
    api_key=key,
    model=model,
    max_tokens=96,
    extra_body={"cot_mode": "soft", "cot": {"max_think_tokens": 48}},
)
chain = ChatPromptTemplate.from_template("What is {a} plus {b}?") | chat

reply = chain.invoke({"a": 7, "b": 5})
print("answered:", reply.content)
# LangChain keeps OpenAI's own fields only: the thoughts and the cot block stay behind, their
# number comes through.
usage = reply.response_metadata["token_usage"]["completion_tokens_details"]
print("thought: ", usage["reasoning_tokens"], "tokens")

print("streamed:", end=" ")
for part in chain.stream({"a": 30, "b": 12}):
    print(part.content, end="", flush=True)
print()
