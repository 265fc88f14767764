# /// udf
# kind = "fs"
# interface = 1
# class = "Hello"
# ///
"""One file that says hello."""

from udf import Attr, FsDriver

TEXT = b"Hello, world!\n"


class Hello(FsDriver):
    """The smallest filesystem."""

    async def list(self, path: str) -> list[str]:
        return ["hello.txt"]

    async def stat(self, path: str) -> Attr:
        if path not in ("/", "/hello.txt"):
            raise FileNotFoundError(path)
        return Attr("dir") if path == "/" else Attr(size=len(TEXT))

    async def read(self, path: str, offset: int, size: int) -> bytes:
        return TEXT[offset : offset + size]
