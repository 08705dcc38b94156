"""Checks of camera images, as the model gets them, against those of the training data.

Axes: N images seen now, M images of training, all uint8 [H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from pi0.robots.robot import Robot
from pi0_eval.doctor.findings import LIKELY, VERY_LIKELY, Finding
from pi0_eval.doctor.recordings import Recording

THUMBNAIL = 24  # pixels of the images that are compared
BLACK = 12.0  # of 255: the mean of an image that is black
STILL = 0.3  # of 255: the mean difference of images that are the same up to compression
GAIN = 0.12  # of correlation, from which on a change of the images explains them better
LEAST = 0.35  # correlation of images that are of one kind
DARKER = 0.25  # share of brightness that may change, beyond three standard deviations of training's
SHOWN = 3  # images in a report

TURNS = {
    "rotated by 180°": lambda x: x[:, ::-1, ::-1],
    "mirrored": lambda x: x[:, :, ::-1],
    "upside down": lambda x: x[:, ::-1],
    "rotated by 90°": lambda x: np.rot90(x, 1, (1, 2)),
    "rotated by 270°": lambda x: np.rot90(x, 3, (1, 2)),
}
ZOOMS = (0.5, 0.6, 0.7, 0.8)

Images = Mapping[str, np.ndarray]  # by the model's camera, uint8 [N, H, W, 3]


def check_images(
    seen: Images, known: Images | None, recording: Recording, training: Recording | None, robot: Robot
) -> list[Finding]:
    """At most one cause for each camera, the first of the chain from the camera to the model.

    Without the images of training (`known`), only cameras that are black, frozen or the same.
    """
    cameras = list(seen)
    found = _swapped(seen, known, robot)
    swapped = {camera for names, _ in found for camera in names}
    findings = [finding for _, finding in found]
    for camera in cameras:
        trained = None if known is None else known.get(camera)
        checks = [_black(camera, seen[camera], trained, robot), _frozen(camera, seen, trained, recording, robot)]
        if trained is not None and camera not in swapped:
            checks += [
                _aspect(camera, seen[camera], trained, recording, training, robot),
                _turned(camera, seen[camera], trained, robot),
                _channels(camera, seen[camera], trained, robot),
                _view(camera, seen[camera], trained, robot),
                _brightness(camera, seen[camera], trained, robot),
            ]
        findings += [f for f in checks if f is not None][:1]
    return findings


def likeness(seen: np.ndarray, known: np.ndarray, of: str = "gray") -> float:
    """How much images [N, H, W, 3] are like others [M, H, W, 3]: the mean of the highest correlation with one.

    It is from -1 to 1, over N. Of "gray", brightness alone, or of "chroma", color alone; each image less its mean.
    """
    a, b = _features(seen, of), _features(known, of)
    return float((a @ b.T).max(axis=1).mean())


def name_of(camera: str, robot: Robot) -> str:
    """The robot's name of a model's camera."""
    return next((name for name, target in robot.cameras.items() if target == camera), camera)


def _features(images: np.ndarray, of: str) -> np.ndarray:
    x = _thumbnails(images)
    gray = x.mean(axis=-1, keepdims=True)
    x = gray - gray.mean(axis=(1, 2), keepdims=True) if of == "gray" else x - gray
    flat = x.reshape(len(x), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Float [N, THUMBNAIL, THUMBNAIL, 3]."""
    size = (THUMBNAIL, THUMBNAIL)
    return np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BOX), np.float32) for i in images])


def _pairs(camera: str, seen: np.ndarray, known: np.ndarray | None, robot: Robot) -> dict[str, np.ndarray]:
    """Images for the report."""
    name = name_of(camera, robot)
    shown = {f"{name}, now ({n + 1})": seen[n] for n in _few(len(seen))}
    return shown | ({} if known is None else {f"{name}, in training ({n + 1})": known[n] for n in _few(len(known))})


def _few(count: int) -> list[int]:
    return [int(n) for n in np.unique(np.linspace(0, count - 1, SHOWN).astype(int))]


def _black(camera: str, seen: np.ndarray, known: np.ndarray | None, robot: Robot) -> Finding | None:
    dark = [
        float(((x.mean(axis=(1, 2, 3)) < BLACK) & (x.std(axis=(1, 2, 3)) < BLACK)).mean()) for x in _both(seen, known)
    ]
    if dark[0] < 0.1 or (known is not None and dark[1] >= dark[0]):
        return None
    evidence = f"{name_of(camera, robot)}: {dark[0]:.0%} of the images are black"
    evidence += "" if known is None else f", in training {dark[1]:.0%}"
    return Finding("black", VERY_LIKELY, evidence + ".", _pairs(camera, seen, known, robot))


def _frozen(camera: str, seen: Images, known: np.ndarray | None, recording: Recording, robot: Robot) -> Finding | None:
    """Images that stay the same while the robot moves."""
    same = np.flatnonzero(np.diff(recording.episode) == 0)
    moved = (recording.speed > 0).any()
    if len(same) < 4 or not moved:
        return None

    def changes(images: np.ndarray) -> np.ndarray:
        x = images.astype(np.float32)
        return np.abs(x[same + 1] - x[same]).mean(axis=(1, 2, 3))

    still = float((changes(seen[camera]) < STILL).mean())
    others = [float(np.median(changes(seen[other]))) for other in seen if other != camera]
    trained = (
        None if known is None else float(np.median(np.abs(np.diff(known.astype(np.float32), axis=0)).mean((1, 2, 3))))
    )
    moving = trained is None or trained > 3 * STILL
    if still < 0.8 or not moving:
        return None
    level = VERY_LIKELY if trained is not None or any(other > 3 * STILL for other in others) else LIKELY
    evidence = (
        f"{name_of(camera, robot)}: {still:.0%} of the images are the same as the one before, while the robot moves"
    )
    return Finding("frozen", level, evidence + ".", _pairs(camera, seen[camera], known, robot))


def _swapped(seen: Images, known: Images | None, robot: Robot) -> list[tuple[list[str], Finding]]:
    cameras, found = list(seen), []
    for i, a in enumerate(cameras):
        for b in cameras[i + 1 :]:
            if np.abs(seen[a].astype(np.float32) - seen[b]).mean() < STILL and seen[a].mean() > BLACK:
                text = f"{name_of(a, robot)} and {name_of(b, robot)} show the same images."
                found.append(([a, b], Finding("swapped", VERY_LIKELY, text, _pairs(a, seen[a], None, robot))))
            if known is None or a not in known or b not in known:
                continue
            own = [likeness(seen[x], known[x]) for x in (a, b)]
            other = [likeness(seen[x], known[y]) for x, y in ((a, b), (b, a))]
            if min(o - w for o, w in zip(other, own, strict=True)) > GAIN and min(other) > LEAST:
                first, second = name_of(a, robot), name_of(b, robot)
                text = (
                    f"{first} looks like training's {second} (correlation {other[0]:.2f}; with its own {own[0]:.2f}), "
                    f"and {second} like training's {first} ({other[1]:.2f}; with its own {own[1]:.2f})."
                )
                images = _pairs(a, seen[a], known[a], robot) | _pairs(b, seen[b], known[b], robot)
                found.append(([a, b], Finding("swapped", VERY_LIKELY, text, images)))
    return found


def _aspect(
    camera: str,
    seen: np.ndarray,
    known: np.ndarray,
    recording: Recording,
    training: Recording | None,
    robot: Robot,
) -> Finding | None:
    if training is not None and not robot.adapts_images:
        shapes = [_shape(r.samples[0], camera, robot) for r in (recording, training)]
        ratios = [height / width for height, width in shapes]
        if abs(ratios[0] / ratios[1] - 1) > 0.05:
            now, then = (f"{width}×{height}" for height, width in shapes)
            text = f"{name_of(camera, robot)}: images are {now} pixels, in training {then}: another aspect ratio."
            return Finding("aspect", VERY_LIKELY, text, _pairs(camera, seen, known, robot))
    bars = [_bars(x) for x in (seen, known)]
    if bars[0] > bars[1] + 0.08:
        text = f"{name_of(camera, robot)}: {bars[0]:.0%} of the image are black bars, in training {bars[1]:.0%}."
        return Finding("aspect", VERY_LIKELY, text, _pairs(camera, seen, known, robot))
    return None


def _shape(frame: Mapping[str, np.ndarray], camera: str, robot: Robot) -> tuple[int, int]:
    """Height and width of a camera's image as it was recorded."""
    names = {name: target for name, target in robot.cameras.items() if target == camera}
    (key,) = [key for key in robot.camera_keys(frame) if any(key.endswith(name) for name in names)][:1]
    shape = np.shape(frame[key])
    return (shape[0], shape[1]) if shape[-1] == 3 else (shape[1], shape[2])


def _bars(images: np.ndarray) -> float:
    """The share of rows and columns that are black in all images."""
    dark = images.max(axis=(0, 3)) < BLACK
    return float(max(dark.all(axis=1).mean(), dark.all(axis=0).mean()))


def _turned(camera: str, seen: np.ndarray, known: np.ndarray, robot: Robot) -> Finding | None:
    own = likeness(seen, known)
    turned = {name: likeness(turn(seen), known) for name, turn in TURNS.items()}
    name = max(turned, key=lambda n: turned[n])
    if turned[name] < own + GAIN or turned[name] < LEAST:
        return None
    text = (
        f"{name_of(camera, robot)}: the images are {name}: so they correlate with training's by {turned[name]:.2f}, "
        f"as they are by {own:.2f}."
    )
    return Finding("orientation", VERY_LIKELY, text, _pairs(camera, seen, known, robot))


def _channels(camera: str, seen: np.ndarray, known: np.ndarray, robot: Robot) -> Finding | None:
    own, other = likeness(seen, known, "chroma"), likeness(seen[..., ::-1], known, "chroma")
    if other < own + GAIN or other < LEAST:
        return None
    text = (
        f"{name_of(camera, robot)}: with red and blue exchanged, colours correlate with training's by {other:.2f}, as "
        f"they are by {own:.2f}: BGR instead of RGB."
    )
    return Finding("channels", VERY_LIKELY, text, _pairs(camera, seen, known, robot))


def _view(camera: str, seen: np.ndarray, known: np.ndarray, robot: Robot) -> Finding | None:
    """The part of training's images that is seen, or the part of what is seen that training's images have."""
    own = likeness(seen, known)
    narrow = {zoom: likeness(seen, _zoomed(known, zoom)) for zoom in ZOOMS}
    wide = {zoom: likeness(_zoomed(seen, zoom), known) for zoom in ZOOMS}
    for what, likes in (("a narrower", narrow), ("a wider", wide)):
        zoom = max(likes, key=lambda z: likes[z])
        if likes[zoom] > own + GAIN and likes[zoom] > LEAST:
            factor = zoom if what == "a narrower" else 1 / zoom
            text = (
                f"{name_of(camera, robot)}: {what} field of view, about {factor:.1f} times training's: so the images "
                f"correlate with training's by {likes[zoom]:.2f}, as they are by {own:.2f}."
            )
            return Finding("fov", VERY_LIKELY, text, _pairs(camera, seen, known, robot))
    return None


def _zoomed(images: np.ndarray, zoom: float) -> np.ndarray:
    """The middle of images, `zoom` of their height and width."""
    height, width = images.shape[1:3]
    y, x = round(height * (1 - zoom) / 2), round(width * (1 - zoom) / 2)
    return images[:, y : height - y, x : width - x]


def _brightness(camera: str, seen: np.ndarray, known: np.ndarray, robot: Robot) -> Finding | None:
    now, then = (x.mean(axis=(1, 2, 3)) for x in (seen, known))
    shift = abs(now.mean() - then.mean())
    if shift < max(DARKER * then.mean(), 3 * then.std()):
        return None
    text = (
        f"{name_of(camera, robot)}: the mean brightness is {now.mean():.0f} of 255, in training {then.mean():.0f} ± "
        f"{then.std():.0f}."
    )
    return Finding("brightness", VERY_LIKELY, text, _pairs(camera, seen, known, robot))


def _both(seen: np.ndarray, known: np.ndarray | None) -> list[np.ndarray]:
    return [seen] if known is None else [seen, known]
