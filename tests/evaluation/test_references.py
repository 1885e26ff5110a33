"""References of other programs and by URL: ADM's npz, EDM2's pkl, our own with rows."""

import functools
import hashlib
import http.server
import json
import pickle
import threading

import numpy as np
import pytest
import torch

import evaluate
from genmodels import images
from genmodels.checkpoint.inert_pickle import load_arrays
from genmodels.evaluation import references
from genmodels.metrics.features import Features, extract, load_features
from tests.helpers.tiny import last_words

WORDS = ["images=digits:test", "features=digits", "resamples=0"]


@pytest.fixture
def score(tmp_path):
    """Return the report of evaluate.py on some words."""

    def scored(*words):
        out = tmp_path / "r.json"
        assert evaluate.main(last_words([*WORDS, *words, f"out={out}"])) == 0
        return json.loads(out.read_text())

    return scored


def refused(capsys, *words):
    capsys.readouterr()
    assert evaluate.main(last_words([*WORDS, *words])) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors  # notes are said with the results alone
    return errors[0]


@pytest.fixture(scope="module")
def train(digits):
    """Return (rows, mu, sigma) of the training digits, by numpy."""
    rows = extract(load_features("digits"), digits[0]).double().numpy()
    return rows, rows.mean(0), np.cov(rows.T)


def test_adm_takes_moments_of_all_and_images_where_only_they_will_do(
    score, tmp_path, digits, train, capsys
):
    _, mu, sigma = train
    some = digits[0][:300]
    adm = tmp_path / "VIRTUAL.npz"
    np.savez(
        adm, some.permute(0, 2, 3, 1).numpy(), mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3]
    )
    report = score(f"reference={adm}", "metrics=fd,kid,prc")
    images.write_npz(tmp_path / "some.npz", images=some.permute(0, 2, 3, 1).numpy())
    of_images = score(f"reference={tmp_path}/some.npz", "metrics=kid,prc")["metrics"]
    whole = score("reference=digits:train", "metrics=fd")["metrics"]
    assert report["metrics"]["fd"]["value"] == pytest.approx(whole["fd"]["value"], rel=1e-9)
    assert {k: report["metrics"][k] for k in of_images} == of_images
    assert report["reference_images"] == 300 and report["reference_num"] is None
    assert not [note for note in report["warnings"] if "not read" in note]
    assert "stages" in score(f"reference={adm}", "metrics=fd")  # no pass over them then
    assert "reference" not in score(f"reference={adm}", "metrics=fd")["stages"]


def edm2(train, **changes):
    _, mu, sigma = train
    return {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu, "sigma": sigma}} | changes


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("kind", [np.float64, np.float32, ">f8"])
def test_arrays_of_a_pickle_of_any_protocol(tmp_path, protocol, kind):
    square = np.arange(12.0).reshape(3, 4).astype(kind)
    things = {
        "fid": {"mu": square[0].copy(), "sigma": square, "columns": np.asfortranarray(square)}
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(things | {"num": 5}, protocol))
    found = load_arrays(path)
    assert found["num"] == 5
    for name, array in things["fid"].items():
        assert np.array_equal(found["fid"][name], array)


def test_pickles_that_do_more_are_refused_unexecuted(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    class Short:
        def __reduce__(self):
            state = (1, (1000, 1000), np.dtype("f8"), False, b"short")
            return (np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state)

    path = tmp_path / "x.pkl"
    for thing, reason in (
        (Evil(), "the name .*open"),
        ({"a": Evil()}, "the name .*open"),
        ({"a": np.array([{}], object)}, "unknown type"),
        (Short(), "shape .1000, 1000. in 5 bytes"),
        (torch.nn.Linear(1, 1), "the name"),
    ):
        path.write_bytes(pickle.dumps(thing))
        with pytest.raises(ValueError, match=f"is not a pickle of numpy arrays; found: .*{reason}"):
            load_arrays(path)
    assert not (tmp_path / "made").exists()


def test_edm2_statistics_of_the_features_in_use(tmp_path, train, digits):
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps(edm2(train, fd_dinov2={"mu": np.zeros(4), "sigma": np.eye(4)})))

    def opened(name, dim):
        features = Features(name, None, "none", dim, None)
        return references.open_reference(str(path), features, read_pickle=load_arrays)

    with pytest.warns(UserWarning, match="does not name the weights"):
        moments = opened("inception", 32).source.moments()
    np.testing.assert_array_equal(moments.mean, train[1])
    np.testing.assert_allclose(moments.cov, train[2], rtol=1e-12)
    with pytest.warns(UserWarning):
        assert len(opened("dinov2", 4).source.moments().mean) == 4
    with pytest.raises(ValueError, match="reference=.*edm2.pkl: has no digits, .*fid, fd_dinov2"):
        opened("digits", 32)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="dimension 9: statistics of"):
        opened("inception", 9)


def test_statistics_with_rows_give_every_score(score, tmp_path, capsys):
    stats = tmp_path / "s.npz"
    words = ["stats", "data=digits:train", "features=digits", f"out={stats}"]
    assert evaluate.main(words) == 0
    assert "metrics=kid: needs the reference's images" in refused(
        capsys, f"reference={stats}", "metrics=kid"
    )
    small = stats.stat().st_size
    assert evaluate.main([*words, "rows=true"]) == 0
    assert stats.stat().st_size > small + 1437 * 32 * 4
    asked = "metrics=fd,kid,prc,nn1"
    from_file, direct = (score(f"reference={r}", asked) for r in (stats, "digits:train"))
    for name, entry in direct["metrics"].items():
        for key, value in entry.items():
            assert from_file["metrics"][name][key] == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert set(from_file["stages"]) == {"images", "scores"}  # no pass over the reference
    with np.load(stats) as file:
        arrays = dict(file)
    np.savez(stats, **arrays | {"rows": np.zeros((5, 3), np.float32)})
    assert "rows has shape (5, 3), not (N, 32)" in refused(
        capsys, f"reference={stats}", "metrics=kid"
    )


class Server:
    """A server of the files in a folder, which counts what is fetched."""

    def __init__(self, folder):
        self.paths = []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                outer.paths.append(self.path)

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


def test_a_url_is_fetched_once_and_its_hash_shown(
    score, tmp_path, train, digits, capsys, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    (tmp_path / "there").mkdir()
    file = tmp_path / "there" / "cifar.npz"
    np.savez(file, mu=train[1], sigma=train[2])
    server = Server(tmp_path / "there")
    try:
        url = f"{server.url}/cifar.npz"
        by_url = score(f"reference={url}", "metrics=fd")
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        assert sha256 in capsys.readouterr().out
        assert by_url["reference_file"] == {"url": url, "sha256": sha256}
        assert by_url["metrics"] == score(f"reference={file}", "metrics=fd")["metrics"]
        assert score(f"reference={url}", "metrics=fd")["metrics"] == by_url["metrics"]
        assert server.paths == ["/cifar.npz"]
        line = refused(capsys, f"reference={server.url}/none.npz")
        assert line.startswith(f"error: reference={server.url}/none.npz: cannot be fetched (")
        assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    finally:
        server.server.shutdown()
        server.server.server_close()
    line = refused(capsys, f"reference={server.url}/other.npz")
    assert "cannot be fetched" in line


@pytest.mark.parametrize(
    ("size", "sent", "line"),
    [
        (None, 2000, "more than 1e-06 GB"),  # no length is said
        (2000, 10, "more than 1e-06 GB"),
        (900, 500, "broke off after 500 of 900 bytes"),
        ("many", 500, "invalid literal"),
    ],
)
def test_what_is_sent_is_bounded_and_whole(tmp_path, monkeypatch, size, sent, line):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(references, "LARGEST_FILE", 1000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if size is not None:
                self.send_header("Content-Length", size)
            self.end_headers()
            self.wfile.write(bytes(sent))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.npz"
        with pytest.raises(ValueError, match=f"reference={url}: cannot be fetched .*{line}"):
            references.fetch(url)
        server.shutdown()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("url", ["http://a b/x", "http:///x", "http://[x", "http://h", "hf://a/b/"])
def test_addresses_that_are_none_are_one_line(url):
    with pytest.raises(ValueError, match="reference=.*(cannot be fetched|write hf)"):
        references.fetch(url)


def test_a_hash_may_be_asked_for(tmp_path, monkeypatch, train):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    np.savez(tmp_path / "s.npz", mu=train[1], sigma=train[2])
    server = Server(tmp_path)
    try:
        sha256 = hashlib.sha256((tmp_path / "s.npz").read_bytes()).hexdigest()
        features = load_features("digits")
        with pytest.warns(UserWarning, match="names no features"):
            references.open_reference(f"{server.url}/s.npz#sha256={sha256[:12]}", features)
        with pytest.raises(ValueError, match="its sha256 is .*to fetch it anew"):
            references.open_reference(f"{server.url}/s.npz#sha256={'0' * 12}", features)
        with pytest.raises(ValueError, match="behind # stands sha256=HEX"):
            references.fetch(f"{server.url}/s.npz#top")
        assert server.paths == ["/s.npz"]
    finally:
        server.server.shutdown()
        server.server.server_close()


def test_a_path_of_the_hub_is_its_librarys(monkeypatch, tmp_path):
    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / "x.npz")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert references.fetch("hf://owner/name/a/b.npz") == tmp_path / "x.npz"
    references.fetch("hf://datasets/owner/name/b.npz")
    assert asked == [("owner/name", "a/b.npz", "model"), ("owner/name", "b.npz", "dataset")]
    with pytest.raises(ValueError, match="reference=hf://name: write hf://OWNER/NAME/FILE"):
        references.fetch("hf://name")


def test_errors_name_the_word_that_was_wrong(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pkl").write_bytes(b"no pickle")
    for path, message in (
        ("none", "no such folder, .zip or .npz"),
        ("empty", "holds no picture"),
        ("bad.pkl", "is not a pickle of numpy arrays"),
    ):
        line = refused(capsys, f"reference={tmp_path}/{path}")
        assert line.startswith(f"error: reference={tmp_path}/{path}") and message in line
        line = refused(capsys, "reference=digits:train", f"images={tmp_path}/{path}")
        assert line.startswith(f"error: images={tmp_path}/{path}")
