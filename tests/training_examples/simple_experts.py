"""Experts of Scenes without networks, for tests of the studies."""

import numpy as np

from modeling_prismer.processing.experts import Expert, ExpertSuite, HashedNgrams
from scenes.run_scenes import DESCRIPTIONS


def look(name, image):
    """The label of a simple expert: gray values, and the places where they are large."""
    values = np.asarray(image.convert("L"))
    if name == "normal":
        return np.asarray(image)
    if name in ("depth", "edge"):
        return values
    ids = np.where(values > 127, 0, 255).astype(np.uint8)
    if name == "segmentation":
        return {"ids": values // 32}
    if name == "detection":
        return {"ids": ids, "classes": [3]}
    return {"ids": ids, "words": ["seen"], "features": HashedNgrams()(["seen"])}


def simple_expert(description):
    def run(self, images):
        return [look(self.name, image) for image in images]

    return type("Simple", (Expert,), {**description, "type": f"study_{description['name']}", "run": run})()


EXPERTS = [simple_expert(description) for description in DESCRIPTIONS]


def simple_suite():
    return ExpertSuite(EXPERTS)
