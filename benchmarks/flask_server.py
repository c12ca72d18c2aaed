"""A baseline server, as one of the original projects sketches it: Flask, one request at a time, plain `generate`.

    python benchmarks/flask_server.py MODEL PORT

Weights, prompt, processor and image budget are ours; decoding is greedy, up to 256 new tokens.
"""

import io
import json
import sys

import torch
from flask import Flask, jsonify, request
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from foodextract import prompts

MAX_NEW_TOKENS = 256


def main(model_id: str, port: int) -> None:
    """Serve until killed."""
    app = Flask(__name__)
    processor = AutoProcessor.from_pretrained(model_id)
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32).eval()
    prompt = processor.apply_chat_template(prompts.conversation(), add_generation_prompt=True)

    @app.post("/predict")
    def predict():
        image = Image.open(io.BytesIO(request.files["image"].read())).convert("RGB")
        inputs = processor(text=prompt, images=[image], return_tensors="pt")
        with torch.inference_mode():
            written = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return jsonify(
            prediction=processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )

    print(json.dumps({"event": "ready"}), file=sys.stderr, flush=True)
    app.run(host="127.0.0.1", port=port, threaded=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
