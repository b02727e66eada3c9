"""Which IP addresses media may be fetched from: public ones only. `public_addresses` resolves a host name."""

import ipaddress
import socket

from atb_pllava.multimodal.media_source_error import MediaSourceError

# IPv6 addresses outside of this network are no global unicast addresses (IANA, Internet Protocol Version 6 Address
# Space). The v4-mapped ::ffff:0:0/96, NAT64's 64:ff9b::/96, fc00::/7, fe80::/10 and ff00::/8 all lie outside.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

# `is_global` of older Python versions knows fewer networks than IANA's registries of special-purpose addresses.
_BLOCKED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network (RFC 791)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # carrier-grade NAT (RFC 6598)
        "127.0.0.0/8",  # loopback (RFC 1122)
        "168.63.129.16/32",  # services of the Azure platform for its own machines
        "169.254.0.0/16",  # link-local (RFC 3927), with the metadata services of clouds
        "172.16.0.0/12",  # private (RFC 1918)
        "192.0.0.0/24",  # IETF protocol assignments (RFC 6890)
        "192.0.2.0/24",  # documentation (RFC 5737)
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "192.168.0.0/16",  # private (RFC 1918)
        "198.18.0.0/15",  # benchmarking (RFC 2544)
        "198.51.100.0/24",  # documentation (RFC 5737)
        "203.0.113.0/24",  # documentation (RFC 5737)
        "224.0.0.0/4",  # multicast (RFC 5771)
        "240.0.0.0/4",  # reserved (RFC 1112), with the broadcast address
        "2001::/23",  # IETF protocol assignments (RFC 2928), with Teredo
        "2001:db8::/32",  # documentation (RFC 3849)
        "2002::/16",  # 6to4 (RFC 3056): an IPv4 address of any kind lies inside
        "3fff::/20",  # documentation (RFC 9637)
    )
)


def is_public(address: str) -> bool:
    """Whether an IP address in its usual spelling belongs to a host on the public internet."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed.scope_id or parsed not in _GLOBAL_UNICAST):
        return False
    return parsed.is_global and not any(parsed in network for network in _BLOCKED)


def public_addresses(host: str, port: int) -> list[str]:
    """The IP addresses of a host name or an IP address, all of them public.

    Raises MediaSourceError when the host has no address, and when any of its addresses is not public. The message does
    not name the address, because the names of a private network are secrets.
    """
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        answers = []
    addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    if not addresses:
        raise MediaSourceError("media_fetch_failed", f"the host {host!r} has no address")
    if not all(map(is_public, addresses)):
        raise MediaSourceError(
            "media_address_blocked", f"the host {host!r} has an address that is not public; media come from public ones"
        )
    return addresses
