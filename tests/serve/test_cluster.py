"""A replica by itself, and two of them in a cluster, one of which is killed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokcomp.serve.cluster import Client, Replica, application

from tests.serve.conftest import DEGREES, IMAGES

ROOT = Path(__file__).resolve().parents[2]


def transform(picture):
    return torch.full((3, 32, 32), picture.getpixel((0, 0))[0] / 255)


def body_of(content):
    async def body():
        return content

    return SimpleNamespace(body=body)


def png(red):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_replica_answers_at_the_degree_of_its_queue(switchable):
    noted = []
    metrics = SimpleNamespace(note=noted.append)
    replica = Replica(lambda: switchable, [4, 8], [1, 3], max_batch=3, max_wait_ms=0, metrics=lambda: metrics)

    async def together():
        return await asyncio.gather(*(replica.infer(image) for image in IMAGES))

    answers = asyncio.run(together())
    for image, answer in zip(IMAGES, answers, strict=True):
        torch.testing.assert_close(answer.logits, switchable(image[None], answer.degree)[0], atol=1e-5, rtol=1e-5)
    assert sorted(map(id, noted)) == sorted(map(id, answers))
    assert max(answer.degree for answer in answers) > DEGREES[0]
    with pytest.raises(ValueError, match="image must be"):
        asyncio.run(replica.infer(IMAGES[0, :, :5]))
    replica.check_health()
    with pytest.raises(ValueError, match=r"up and down must both be given or neither, got up=\[1\], down=None"):
        Replica(lambda: switchable, up=[1])


def test_a_replica_whose_model_fails_is_unhealthy(switchable):
    class Broken:
        degrees, check_image, example_image = DEGREES, switchable.check_image, switchable.example_image

        def __call__(self, images, degree):
            raise OSError("no more memory")

    replica = Replica(Broken)
    with pytest.raises(OSError, match="no more memory"):
        asyncio.run(replica.infer(IMAGES[0]))
    with pytest.raises(RuntimeError, match="the server stopped on OSError"):
        replica.check_health()


def test_pictures_by_http(switchable):
    pytest.importorskip("starlette")
    replica = Replica(lambda: switchable, transform=transform)
    answer = asyncio.run(replica(body_of(png(200))))
    logits = switchable(torch.full((1, 3, 32, 32), 200 / 255), 0)[0]
    said = json.loads(answer.body)
    assert answer.status_code == 200 and said["class"] == int(logits.argmax()) and said["degree"] == 0
    assert said["probability"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-4)
    refused = asyncio.run(replica(body_of(b"no picture")))
    assert refused.status_code == 400 and "the body must be a picture" in json.loads(refused.body)["error"]
    assert asyncio.run(Replica(lambda: switchable)(body_of(png(1)))).status_code == 501


def test_without_ray_it_says_what_to_install(switchable, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'tokcomp\[ray\]'"):
        application(lambda: switchable)


def build():
    """In the replicas' own processes: digits, at 50 ms or more for a batch."""
    import time

    import timm
    import tokcomp
    import tokcomp.assets  # registers the digits model

    torch.manual_seed(0)
    model = timm.create_model("tokcomp_digits_vit", pretrained=True).eval()

    class Slow(tokcomp.Switchable):
        def __call__(self, images, degree=None):
            time.sleep(0.05)
            return super().__call__(images, degree)

    return Slow(model, tokcomp.ToCom(model, max_degree=16), degrees=[0, 8, 16])


@pytest.mark.slow
def test_nothing_is_lost_when_a_replica_is_killed(tmp_path):
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        options = {"ray_actor_options": {"num_cpus": 0.5}, "health_check_period_s": 1}
        handle = serve.run(
            application(build, up=[8, 24], down=[2, 8], max_batch=8, **options), route_prefix=None, name="digits"
        )
        client, alone = Client(handle), build()
        images = torch.rand(400, 3, 32, 32)
        assert len(client.ask(images[:8])) == 8
        answers = []
        clients = [
            threading.Thread(target=lambda part=part: answers.append((part, client.ask(list(part)))))
            for part in images.split(100)
        ]
        for thread in clients:
            thread.start()
        names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "tokcomp" in one["name"]]
        assert len(names) == 2
        client.ask(images[:16])  # behind others, so both replicas are at work now
        ray.kill(ray.get_actor(names[0], namespace="serve"))
        for thread in clients:
            thread.join()
        assert sum(len(found) for _, found in answers) == 400 and client.resent > 0
        for part, found in answers:
            for image, answer in list(zip(part, found, strict=True))[::10]:
                expected = alone(image[None], answer.degree)[0]
                torch.testing.assert_close(answer.logits, expected, atol=1e-4, rtol=1e-4)
        assert {answer.degree for _, found in answers for answer in found} > {0}
        with pytest.raises(ValueError, match="image must be"):
            client.ask([images[0, :, :5]])
    finally:
        serve.shutdown()
        ray.shutdown()
