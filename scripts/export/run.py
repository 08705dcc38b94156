"""Run an export of π0 or π0.5 without this project, on inputs in an npz file: python run.py FOLDER INPUTS.npz OUT.npy

Needs onnxruntime for .onnx, or PyTorch for .pt2. Without an input in the file it is random, or for masks all True.
"""

import json
import sys
from pathlib import Path

import numpy as np

folder, given = Path(sys.argv[1]), dict(np.load(sys.argv[2]))
manifest = json.loads((folder / "manifest.json").read_text())
sizes = {"batch": 1, "cameras": manifest["sizes"]["cameras"][1], "prompt": manifest["sizes"]["prompts"][-1]}
sizes |= {"cameras": given["images"].shape[1], "prompt": given["prompt"].shape[1]} if given else {}


def fill(dtype, shape):
    shape = [sizes.get(n, n) for n in shape]
    return np.random.normal(size=shape).astype(dtype) if dtype == "float32" else np.ones(shape, dtype)


def call(program, arrays):
    path, inputs, outputs = str(folder / program["file"]), program["program"]["inputs"], program["program"]["outputs"]
    arrays = {x["name"]: arrays[x["name"]] if x["name"] in arrays else fill(x["dtype"], x["shape"]) for x in inputs}
    if manifest["to"] == "onnx":
        import onnxruntime

        found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, arrays)
    else:
        import torch

        compiled = manifest["to"] == "aoti"
        loaded = torch._inductor.aoti_load_package(path) if compiled else torch.export.load(path).module()
        found = [x.detach().cpu().numpy() for x in loaded(*map(torch.from_numpy, arrays.values()))]
    return dict(zip((x["name"] for x in outputs), found, strict=True))


for program in manifest["programs"].values():  # sample; or prefix, and denoise with what it gave
    given |= call(program, given)
np.save(sys.argv[3], given["actions"])
print(given["actions"].shape)
