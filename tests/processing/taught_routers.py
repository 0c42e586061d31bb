"""Small routers that have learned which experts some questions need."""

import torch

from modeling_prismer.processing.expert_router import ExpertRouter, RouterConfig, RouterPrice


SUBSETS = [[], ["depth"], ["ocr"], ["depth", "ocr"]]
SECONDS = [0.0, 0.02, 0.1, 0.12]
LESSONS = {
    "What does the sign say?": ["ocr"],
    "Which word is on the left sign?": ["ocr"],
    "Is the cone nearer than the ball?": ["depth"],
    "Which is nearest?": ["depth"],
    "What color is the ball?": [],
    "Is there a cube?": [],
}


def taught_router(lessons=LESSONS, subsets=SUBSETS, seconds=SECONDS, images=None, steps=150):
    """
    A router that has learned to score 1 with the experts of a lesson and 0.2 without them. With `images`, features of
    images in place of texts, the lessons are about these.
    """
    torch.manual_seed(0)
    config = RouterConfig(
        subsets=subsets,
        seconds=seconds,
        image_size=0 if images is None else images.shape[1],
        buckets=256,
        hidden_size=16,
        prices=[RouterPrice(0.0, 60.0, 1.0), RouterPrice(2.0, 40.0, 1.0), RouterPrice(20.0, 10.0, 0.6)],
        default_price=2.0,
    )
    router = ExpertRouter(config)
    wanted = torch.tensor(
        [[1.0 if set(own) <= set(subset) else 0.2 for subset in subsets] for own in lessons.values()]
    )
    words = [router.words_of(text) for text in lessons]
    optimizer = torch.optim.Adam(router.network.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(router.network(words, images), wanted).backward()
        optimizer.step()
    return router
