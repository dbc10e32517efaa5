"""Images of any format, depth and orientation become upright RGB; anything else is refused by name."""

import http.server
import io
import os
import struct
import threading
import zlib

import numpy
import pytest
from mbridge_train.data.errors import RowError
from mbridge_train.data.examples import ImageReference
from mbridge_train.data.images import decode, image_size
from PIL import Image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def save(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def pixels(data):
    image = decode(ImageReference(data=data), "here")
    assert image.mode == "RGB"
    return numpy.asarray(image)


def two_pixels(mode="RGB", first=RED, second=BLUE):
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), first)
    image.putpixel((1, 0), second)
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (save(two_pixels()), [RED, BLUE]),
        (save(two_pixels(), "BMP"), [RED, BLUE]),
        (save(two_pixels(), "WEBP", lossless=True), [RED, BLUE]),
        (save(two_pixels().convert("P", palette=Image.Palette.ADAPTIVE), "GIF"), [RED, BLUE]),
        (save(two_pixels("L", 7, 200)), [(7, 7, 7), (200, 200, 200)]),
        (save(two_pixels("1", 0, 1)), [(0, 0, 0), WHITE]),
        (save(two_pixels("RGBA", (*RED, 255), (0, 0, 0, 0))), [RED, WHITE]),
        (save(two_pixels("LA", (9, 255), (9, 0))), [(9, 9, 9), WHITE]),
        (save(two_pixels().convert("P", palette=Image.Palette.ADAPTIVE), transparency=0), None),
        (save(Image.fromarray(numpy.array([[256 * 7, 65535]], dtype=numpy.uint16))), [(7, 7, 7), WHITE]),
        (save(Image.fromarray(numpy.array([[256 * 7, 65535]], dtype=numpy.int32)), "TIFF"), [(7, 7, 7), WHITE]),
        (save(two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "TIFF"), [RED, WHITE]),
    ],
)
def test_every_mode_becomes_rgb(data, expected):
    if expected is None:  # one of the two colours of the palette is transparent: which one is the encoder's choice
        assert sorted([tuple(pixel) for pixel in pixels(data)[0].tolist()])[-1] == WHITE
    else:
        assert [tuple(pixel) for pixel in pixels(data)[0].tolist()] == expected


def test_orientation_of_a_camera():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned right
    turned = pixels(save(two_pixels(), exif=exif))
    assert turned.shape == (2, 1, 3)
    assert [tuple(pixel[0]) for pixel in turned.tolist()] == [RED, BLUE]


def late_exif(data, exif):
    """A PNG file with its EXIF after the pixels."""
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:-12] + chunk + data[-12:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "late PNG", "WEBP", "TIFF"])
def test_the_header_tells_the_upright_size(format, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (40, 30))
    data = late_exif(save(image), exif) if format == "late PNG" else save(image, format, exif=exif)
    decoded = decode(ImageReference(data=data), "here")
    assert decoded.size == ((30, 40) if orientation > 4 else (40, 30))
    if format != "late PNG":  # whose pixels have to be read
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert image_size(ImageReference(data=data), "here") == decoded.size


@pytest.mark.parametrize("format", ["GIF", "BMP", "PPM"])
def test_the_header_of_other_formats(format):
    assert image_size(ImageReference(data=save(Image.new("RGB", (40, 30)), format)), "here") == (40, 30)


GOOD = save(Image.effect_noise((64, 64), 50), "JPEG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no image format that is read here"),
        (b"GIF89a", "here: the image of 6 bytes cannot be decoded"),
        (GOOD[: len(GOOD) // 2], "cannot be decoded: .*truncated"),
        (save(Image.effect_noise((64, 64), 50))[:-2000], "cannot be decoded: .*truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image format that is read here"),
        (save(Image.fromarray(numpy.ones((2, 2), dtype=numpy.float32)), "TIFF"), "floating-point numbers"),
        (save(Image.new("1", (12_000, 12_000))), r"12000 x 12000 pixels, more than 134217728"),
        (save(Image.new("1", (20_000, 20_000))), r"400000000 pixels. exceeds limit"),
    ],
)
def test_what_cannot_be_decoded_is_named(data, message):
    with pytest.raises(RowError, match=message):
        decode(ImageReference(data=data), "here")


def test_limit_on_pixels_counts_before_unpacking():
    with pytest.raises(RowError, match=r"64 x 64 pixels, more than 4095; .*data.oversized=resize"):
        decode(ImageReference(data=GOOD), "here", most_pixels=4095)
    assert decode(ImageReference(data=GOOD), "here", most_pixels=4096).size == (64, 64)


def test_files(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(save(two_pixels()))
    assert decode(ImageReference(location=str(path)), "here").size == (2, 1)
    with pytest.raises(RowError, match=r"here: the image .*/b.png cannot be read: No such file or directory"):
        decode(ImageReference(location=str(tmp_path / "b.png")), "here")
    with pytest.raises(RowError, match="cannot be read: Is a directory"):
        decode(ImageReference(location=str(tmp_path)), "here")


@pytest.mark.timeout(60)
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RowError, match=r"a\.png cannot be read: Is not a regular file"):
        image_size(ImageReference(location=str(tmp_path / "a.png")), "here")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serve an image, drip the bytes of headers or body, or redirect to another server or protocol."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/drip"):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if self.path == "/drip-body" else b""))
            try:
                while not self.server.is_over.wait(0.05):
                    self.wfile.write(b"X" if self.path == "/drip-body" else b"X: 1\r\n")
            except OSError:
                self.server.ended.set()
            return
        goals = {"/again": "/a.png", "/away": f"{self.server.other}/a.png", "/ftp": "ftp://127.0.0.1/a.png"}
        self.send_response(302 if self.path in goals else 200 if self.path == "/a.png" else 404)
        if self.path in goals:
            self.send_header("Location", goals[self.path])
        self.end_headers()
        self.wfile.write(save(two_pixels()))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """On 127.0.0.1, with another one on 127.0.0.2."""
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server,
        http.server.ThreadingHTTPServer(("127.0.0.2", 0), _Handler) as other,
    ):
        server.asked = other.asked = []
        server.other = other.other = f"http://127.0.0.2:{other.server_port}"
        server.is_over, server.ended = threading.Event(), threading.Event()
        for one in (server, other):
            threading.Thread(target=one.serve_forever, daemon=True).start()
        yield server
        server.is_over.set()
        server.shutdown()
        other.shutdown()


def served(server, path, networks=("127.0.0.1",), host="127.0.0.1"):
    reference = ImageReference(location=f"http://{host}:{server.server_port}{path}", networks=networks)
    return decode(reference, "here")


def test_urls(server):
    assert served(server, "/a.png").size == (2, 1)
    assert served(server, "/again").size == (2, 1)
    with pytest.raises(RowError, match=r"here: the image http.*/b.png cannot be read: .*404"):
        served(server, "/b.png")
    with pytest.raises(RowError, match=r"cannot be read: .*ftp"):
        served(server, "/ftp")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_private_addresses_are_refused_unless_a_key_names_them(server, host):
    with pytest.raises(RowError, match=rf"{host} is at [\d.:]+, which is not a public address; .*private_networks=\["):
        served(server, "/a.png", (), host)
    assert server.asked == []
    assert served(server, "/a.png", ("127.0.0.0/8",), host).size == (2, 1)


def test_the_address_behind_a_redirect_is_checked(server):
    with pytest.raises(RowError, match=r"127\.0\.0\.2 is at 127\.0\.0\.2, which is not a public address"):
        served(server, "/away")
    assert server.asked == ["/away"]
    assert served(server, "/away", ("127.0.0.1", "127.0.0.2")).size == (2, 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", ["/drip-head", "/drip-body"])
def test_a_server_that_drips_bytes_holds_nobody(server, path, monkeypatch):
    monkeypatch.setattr("mbridge_train.data.fetch.FETCH_SECONDS", 2.0)
    with pytest.raises(RowError, match=r"/drip.* cannot be read: it was not complete after 2 seconds"):
        served(server, path)
    assert server.ended.wait(20)  # no connection is left behind


def test_a_proxy_may_have_any_address(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(RowError, match="404"):  # the server takes the whole URL for a path
        decode(ImageReference(location="http://images.invalid/a.png"), "here")
    assert server.asked == ["http://images.invalid/a.png"]


def test_the_file_of_a_broken_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(RowError, match=r"here: the image .*/a\.png of 6 bytes cannot be decoded"):
        decode(ImageReference(location=str(tmp_path / "a.png")), "here")
