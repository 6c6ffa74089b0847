import pytest

from proxy.profiles.s3.addressing import Level, address_of, parameters

HOSTS = ["s3.example.com", "localhost"]


@pytest.mark.parametrize(
    ("target", "host", "bucket", "key", "level"),
    [
        ("/", "s3.example.com", "", "", Level.SERVICE),
        ("/?x=/y", "s3.example.com:9000", "", "", Level.SERVICE),
        ("/bucket", "s3.example.com", "bucket", "", Level.BUCKET),
        ("/bucket/", "s3.example.com", "bucket", "", Level.BUCKET),
        ("/bucket/a/b%20c?acl", "S3.Example.com.", "bucket", "a/b%20c", Level.OBJECT),
        ("/bucket//a", "s3.example.com", "bucket", "/a", Level.OBJECT),
        ("/", "bucket.s3.example.com", "bucket", "", Level.BUCKET),
        ("/a/b", "Bucket.with.dots.s3.example.com:443", "bucket.with.dots", "a/b", Level.OBJECT),
        ("//a", "bucket.localhost:1", "bucket", "/a", Level.OBJECT),
        ("/bucket/a", "evils3.example.com", "bucket", "a", Level.OBJECT),
        ("/bucket/a", ".s3.example.com", "bucket", "a", Level.OBJECT),
        ("/bucket/a", "127.0.0.1:4443", "bucket", "a", Level.OBJECT),
        ("/bucket/a", "[::1]:4443", "bucket", "a", Level.OBJECT),
    ],
)
def test_addresses(target: str, host: str, bucket: str, key: str, level: Level) -> None:
    address = address_of(target, host, HOSTS)
    assert (address.bucket, address.key, address.level) == (bucket, key, level)
    assert address.virtual_host is (bool(bucket) and f"{bucket}." in host.lower())


def test_parameters_keep_the_first_and_the_empty() -> None:
    assert parameters("/b?uploads&prefix=a%2Fb&prefix=c&x=1+2") == {
        "uploads": "",
        "prefix": "a/b",
        "x": "1 2",
    }
    assert parameters("/b") == {}
