"""A checkpoint with an expert for features on the page: its grid is drawn and replaced, and cannot be edited."""

import numpy as np
import pytest

from tests.processing.experts.feature_checkpoint import save_feature_checkpoint


gr = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_feature_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_the_page_shows_and_replaces_its_grid(folder, shape):
    from drawings import drawn_label, looked_panel
    from reader import Reader
    from sessions import Session

    reader = Reader(str(folder), "cpu")
    session = Session(image=shape, seen={seen.name: seen.label for seen in reader.look(shape)})
    assert set(session.seen["features"]) == {"values", "low", "high"}
    assert np.asarray(drawn_label(reader, shape, "features", session.seen["features"]).image).std() > 5
    said = reader.explain(session.encoding("seen", reader), "What is it?")
    assert said.looked_at_experts["features"].shape == (4, 4)
    assert "Features, bright where the model attended" in looked_panel(reader, session, session.seen, said, "")
    for mode in ("noise", "off"):
        session.set_mode("features", mode)
        changed = session.encoding("yours", reader).states
        assert (changed - session.encoding("seen", reader).states).abs().max() > 1e-4


def test_its_grid_has_no_editor(folder, monkeypatch):
    import app
    from checks import Refused
    from page import Page

    pages = []
    build = Page.build
    monkeypatch.setattr(Page, "build", lambda self: pages.append(self) or build(self))
    blocks, _ = app.make_app([str(folder)], "cpu")
    try:
        (page,) = pages
        shown = {name: button.visible for name, button in page.edit_buttons.items()}
        assert shown == {"edge": True, "features": False}
        monkeypatch.setattr(page, "_with_image", lambda request: None)
        with pytest.raises(Refused, match="features is a grid of vectors, which cannot be edited"):
            page._open_editor("features")(None)
    finally:
        blocks.close(verbose=False)
