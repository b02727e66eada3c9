"""Asks a running server about a video, with the official openai client.

    atb-pllava serve                                     # in one terminal
    python examples/serving/ask_server.py VIDEO ["QUESTION"] [--url http://127.0.0.1:8000] [--stream]

The key is taken from ATB_PLLAVA_API_KEY. A server without keys takes any.
"""

import argparse
import base64
import mimetypes
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("question", nargs="?", default="Describe this video.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--stream", action="store_true", help="print the answer while it grows")
    arguments = parser.parse_args()

    client = OpenAI(base_url=f"{arguments.url}/v1", api_key=os.environ.get("ATB_PLLAVA_API_KEY", "EMPTY"))
    model = client.models.list().data[0].id
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": data_url(arguments.video)}},
                {"type": "text", "text": arguments.question},
            ],
        }
    ]
    if arguments.stream:
        for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=200, stream=True):
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    else:
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=200)
        print(answer.choices[0].message.content)


def data_url(path: str) -> str:
    """The file as a data: URL. The server goes by the content, so that any video type will do."""
    kind = mimetypes.guess_type(path)[0] or "video/mp4"
    with open(path, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode('ascii')}"


if __name__ == "__main__":
    main()
