"""Write π0-FAST's tokens with an export to ONNX, without this project: python run_fast.py FOLDER INPUTS.npz OUT.npy

The file has images [B, C, height, width, 3], image_masks [B, C], prompt [B, L] and prompt_mask [B, L].
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

END = 1  # the token that ends a text
folder, x = Path(sys.argv[1]), dict(np.load(sys.argv[2]))
manifest = json.loads((folder / "manifest.json").read_text())
model = json.loads((folder / "config.json").read_text())["model"]
skipped = 0 if model["text_format"] == "lerobot" else 1  # openpi leaves one position out after the prompt
steps = manifest["room"]
sessions = {
    name: onnxruntime.InferenceSession(str(folder / program["file"]), providers=["CPUExecutionProvider"])
    for name, program in manifest["programs"].items()
}


def run(name, arrays):
    inputs, outputs = ([y.name for y in ys] for ys in (sessions[name].get_inputs(), sessions[name].get_outputs()))
    return dict(zip(outputs, sessions[name].run(outputs, {y: arrays[y] for y in inputs}), strict=True))


x |= run("prefix", x)
(batch, start), length = x["seen"].shape, x["seen"].sum(1, keepdims=True)
valid, places = np.pad(x["seen"], [(0, 0), (0, steps)]), np.arange(start + steps)
x |= {name: np.pad(x[name], [(0, 0)] * 3 + [(0, steps), (0, 0)]) for name in ("keys", "values")}  # room for all tokens
tokens, done = np.zeros((batch, steps), np.int32), np.zeros(batch, bool)
for i in range(steps):
    if i > 0:  # read the token before: it takes its place in the cache
        x |= {"token": tokens[:, i - 1, None], "position": (length + skipped + i - 1).astype(np.int32)}
        x |= {"slot": np.array([start + i - 1], np.int32), "seen": valid | (places >= start) & (places < start + i)}
        x |= run("decode", x)
        x |= {"keys": x["next_keys"], "values": x["next_values"]}
    tokens[:, i] = np.where(done, 0, x["logits"].argmax(1))
    done |= tokens[:, i] == END
    if done.all():
        break
np.save(sys.argv[3], tokens)
print(tokens)
