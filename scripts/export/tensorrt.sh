#!/usr/bin/env bash
# Build a TensorRT engine of an export to ONNX, on the machine that runs it (a Jetson with JetPack 7, or a GPU with
# TensorRT 10.8 or newer):  tensorrt.sh FOLDER [PROGRAM]
#
# Not run so far: no such device was at hand. docs/export.md says what to check.
set -euo pipefail

folder=${1:?the folder of an export}
program=${2:-sample}
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}

shapes() { # the inputs of a program, axes without a fixed size at their least, $1 = 0, or most, $1 = 1
  python3 - "$folder/manifest.json" "$program" "$1" <<'PYTHON'
import json, sys
manifest, program, which = json.load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3])
model = json.load(open(sys.argv[1].replace("manifest.json", "config.json")))["model"]
sizes, room = manifest["sizes"], manifest["room"]
patch, resolution = model["vision"]["patch_size"], model["image_resolution"]
tokens = (resolution[0] // patch) * (resolution[1] // patch)
cameras, prompt = sizes["cameras"][which], sizes["prompts"][-which]
axes = {"batch": sizes["batch"][which], "cameras": cameras, "prompt": prompt, "prefix": cameras * tokens + prompt}
axes["cached"] = axes["prefix"] + room
inputs = manifest["programs"][program]["program"]["inputs"]
dynamic = [x for x in inputs if any(isinstance(n, str) for n in x["shape"])]
print(",".join(f"{x['name']}:" + "x".join(str(axes.get(n, n)) for n in x["shape"]) for x in dynamic))
PYTHON
}

options=(--onnx="$folder/$program.onnx" --saveEngine="$folder/$program.engine" --stronglyTyped --skipInference)
least=$(shapes 0)
most=$(shapes 1)
if [ -n "$least" ]; then
  options+=(--minShapes="$least" --optShapes="$most" --maxShapes="$most")
fi
exec "$trtexec" "${options[@]}" --builderOptimizationLevel=4 --profilingVerbosity=detailed
