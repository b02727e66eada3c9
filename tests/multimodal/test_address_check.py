"""Which addresses count as public. Oracles: Python's ipaddress, and the networks of RFCs and IANA's registries."""

import ipaddress
import random

import pytest

from atb_pllava.multimodal.address_check import is_public, public_addresses
from atb_pllava.multimodal.media_source_error import MediaSourceError
from tests.media_network import PUBLIC, Network

# IANA's special-purpose registries (RFC 6890, 8190) and what embeds an IPv4 address: no media come from these.
SPECIAL = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32", "168.63.129.16/32",
    "::/128", "::1/128", "::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64",
    "2001::/32", "2001:2::/48", "2001:10::/28", "2001:20::/28", "2001:db8::/32", "2002::/16", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
]  # fmt: skip
PUBLIC_ADDRESSES = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "169.253.255.255", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "198.17.255.255",
    "198.20.0.0", "223.255.255.255", "2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001::1",
]  # fmt: skip


@pytest.mark.parametrize("network", SPECIAL)
def test_special_networks_are_not_public(network: str) -> None:
    addresses = ipaddress.ip_network(network)
    middle = addresses[addresses.num_addresses // 2]
    assert not any(is_public(str(address)) for address in (addresses[0], middle, addresses[-1]))


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_beside_them(address: str) -> None:
    assert ipaddress.ip_address(address).is_global and is_public(address)


def test_nothing_counts_as_public_that_python_does_not_call_global() -> None:
    numbers = random.Random(0)
    versions = [(ipaddress.IPv4Address, 32), (ipaddress.IPv6Address, 128)]
    addresses = [kind(numbers.getrandbits(bits)) for kind, bits in versions for _ in range(3000)]
    public = [address for address in addresses if is_public(str(address))]
    assert len(public) > 2000
    assert all(address.is_global and not address.is_multicast for address in public)


@pytest.mark.parametrize("embedded", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "8.8.8.8"])
def test_ipv4_addresses_inside_ipv6_addresses(embedded: str) -> None:
    number = int(ipaddress.IPv4Address(embedded))
    inside = [
        number,  # v4-compatible
        (0xFFFF << 32) | number,  # v4-mapped
        (0x64FF9B << 96) | number,  # NAT64
        (0x2002 << 112) | (number << 80),  # 6to4
        (0x20010000 << 96) | (number ^ 0xFFFFFFFF),  # Teredo
    ]
    assert not any(is_public(str(ipaddress.IPv6Address(address))) for address in inside)


def test_an_address_of_one_interface_is_not_public() -> None:
    assert not is_public("fe80::1%eth0") and not is_public("2606:4700:4700::1111%2")


@pytest.mark.parametrize(
    "answer",
    [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["10.0.0.1", PUBLIC], [PUBLIC, "::1"], [PUBLIC, "fd00:ec2::254"]],
)
def test_one_private_address_blocks_the_host(network: Network, answer: list[str]) -> None:
    network.names["mixed.test"] = [answer]
    with pytest.raises(MediaSourceError) as error:
        public_addresses("mixed.test", 80)
    assert error.value.code == "media_address_blocked"
    assert not any(address in str(error.value) for address in answer)


def test_addresses_are_listed_once_and_in_order(network: Network) -> None:
    network.names["good.test"] = [["1.1.1.1", PUBLIC, "1.1.1.1"]]
    assert public_addresses("good.test", 443) == ["1.1.1.1", PUBLIC]


@pytest.mark.parametrize("host", ["nowhere.test", "a" * 70 + ".test"])
def test_a_host_without_an_address(network: Network, host: str) -> None:
    with pytest.raises(MediaSourceError) as error:
        public_addresses(host, 80)
    assert error.value.code == "media_fetch_failed"
