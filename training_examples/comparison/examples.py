"""Examples in context: random ones, or those of similar images."""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from modeling_prismer.command_line.arguments import weight_fingerprint
from training import write_json

from .arguments import CompareArguments, ModelName
from .models import CannotDo, Example, NamedImage, Query, open_model
from .sources import Sample, load_support


class Examples:
    """
    Samples from which examples are chosen. All models of a comparison get the same ones.

    Args:
        args ([`CompareArguments`]): the arguments.
        task (`str`): `"caption"` or `"vqa"`.
        asked (`list[Sample]`): the samples that are measured. They are never examples.
    """

    def __init__(self, args: CompareArguments, task: str, asked: Sequence[Sample]):
        self.args = args
        self.asked = asked
        own = {sample.image.image_id for sample in asked}
        by_image: dict[str, list[Sample]] = defaultdict(list)
        for sample in load_support(args, task, args.num_support):
            if sample.image.image_id not in own and sample.references:
                by_image[sample.image.image_id].append(sample)
        self.by_image = list(by_image.values())

    def queries(self, shots: int) -> list[Query]:
        """A query for each sample, after `shots` examples."""
        number = shots or self.args.text_examples
        if number > len(self.by_image):
            raise ValueError(f"--shots {shots}: the support has {len(self.by_image)} images only")
        queries = []
        for place, sample in enumerate(self.asked):
            random = np.random.default_rng([self.args.seed, place])
            if self.args.shots_by == "similar":
                chosen = self.nearest[sample.image.image_id][:number][::-1]  # the most similar image is the last
            else:
                chosen = random.permutation(len(self.by_image))[:number].tolist()
            drawn = [self.by_image[image][random.integers(len(self.by_image[image]))] for image in chosen]
            shown = [Example(own.text, own.references[0], own.image if shots else None) for own in drawn]
            queries.append(Query((sample.image,), sample.text, tuple(shown)))
        return queries

    @cached_property
    def nearest(self) -> dict[str, list[int]]:
        """
        For each image the places of the images of the support, the most similar ones first. They are kept in the
        output folder, since each model may run in a process of its own.
        """
        path = Path(self.args.output_dir or ".", "similar_images.json")
        images = {sample.image.image_id: sample.image for sample in self.asked}
        support = [own[0].image for own in self.by_image]
        most = max([*self.args.shots, self.args.text_examples])
        model = ModelName.read(self.args.similar_by or "")
        made_of = {
            "similar_by": self.args.similar_by,
            "weights": weight_fingerprint(model.path),
            "support": [image.image_id for image in support],
            "images": list(images),
            "most": most,
        }
        if path.exists():
            known = json.loads(path.read_text())
            if known["made_of"] == made_of:
                return known["nearest"]
        mine, theirs = self.embed(model, [list(images.values()), support])
        order = np.argsort(-(mine @ theirs.T), axis=1, kind="stable")[:, :most].tolist()
        nearest = dict(zip(images, order))
        write_json(path, {"made_of": made_of, "nearest": nearest})
        return nearest

    def embed(self, name: ModelName, parts: Sequence[Sequence[NamedImage]]) -> list[np.ndarray]:
        """Vectors of length 1."""
        try:
            model = open_model(name, self.args)
            vectors = [model.embed(images) for images in parts]
        except CannotDo as error:
            raise ValueError(f"--shots_by similar: {error}; name a model that does: --similar_by") from error
        return [own / np.linalg.norm(own, axis=1, keepdims=True) for own in vectors]
