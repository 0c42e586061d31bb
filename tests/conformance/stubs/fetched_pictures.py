"""Nothing is fetched from the Hub: every picture that a test asks for is the same small one, drawn here."""

import os
import tempfile

import numpy as np
from PIL import Image


def url_to_local_path(url: str, *args, **kwargs) -> str:
    if not url.endswith((".png", ".jpg")):
        return url  # sound and video, which no model here takes
    path = os.path.join(tempfile.gettempdir(), f"conformance-{os.getpid()}.png")
    if not os.path.exists(path):
        y, x = np.mgrid[:120, :160]
        Image.fromarray(np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)).save(path)
    return path
