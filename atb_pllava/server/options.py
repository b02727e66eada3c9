"""ServerOptions: the user's choices about the HTTP server. Each field is an option of `atb-pllava serve`."""

from dataclasses import dataclass, field

from atb_pllava.config import check_choice, option
from atb_pllava.errors import ConfigError, check_number, check_whole_number

LOG_LEVELS = ("debug", "info", "warning", "error")
LARGEST_NUM_FRAMES = 64  # as MediaLimits.max_sampled_frames


@dataclass(frozen=True)
class ServerOptions:
    """How the server listens and what it accepts. API keys are no option: they come from a file or the environment.

    Raises ConfigError naming the option, its value and the allowed values.
    """

    host: str = field(default="127.0.0.1", metadata=option("address to listen on (default {default})", "ADDRESS"))
    port: int = field(default=8000, metadata=option("port to listen on (default {default}; 0: any free one)"))
    root_path: str = field(default="", metadata=option("path prefix that a proxy in front removes", "PATH"))
    served_model_name: str | None = field(
        default=None, metadata=option("the model's name in requests (default: the checkpoint folder's name)", "NAME")
    )
    api_key_file: str | None = field(
        default=None, metadata=option("a file of API keys, one a line (or ATB_PLLAVA_API_KEY; default: none)", "FILE")
    )
    allowed_media_domains: str | None = field(
        default=None, metadata=option("hosts that media may be fetched from, comma-joined (default: none)", "HOSTS")
    )
    allowed_local_media_path: str | None = field(
        default=None, metadata=option("folder that file: URLs may name files in (default: none)", "DIR")
    )
    cors_origins: str | None = field(
        default=None, metadata=option("web origins that may call the server, comma-joined (default: none)", "ORIGINS")
    )
    max_frames: int = field(
        default=16, metadata=option("the most frames that a request may ask for (default {default})")
    )
    max_waiting: int = field(
        default=256, metadata=option("requests that may wait for the engine; more get 429 (default {default})")
    )
    max_body_mib: int = field(default=64, metadata=option("the largest request body, in MiB (default {default})"))
    max_videos_mib: int = field(
        default=1024, metadata=option("memory for registered videos, in MiB (default {default})")
    )
    video_ttl: float = field(
        default=3600.0,
        metadata=option("seconds that a registered video lives after its last use (default {default})", "S"),
    )
    shutdown_timeout: float = field(
        default=30.0, metadata=option("seconds that running requests get after SIGTERM (default {default})", "S")
    )
    log_level: str = field(
        default="info",
        metadata=option(
            "least level of stderr's lines; from warning on, stdout has no access log (default {default})",
            "LEVEL",
            choices=LOG_LEVELS,
        ),
    )

    def __post_init__(self) -> None:
        check_whole_number("port", self.port, 0, 65535)
        check_whole_number("max_frames", self.max_frames, 1, LARGEST_NUM_FRAMES)
        check_whole_number("max_waiting", self.max_waiting, 1, 65536)
        check_whole_number("max_body_mib", self.max_body_mib, 1, 4096)
        check_whole_number("max_videos_mib", self.max_videos_mib, 1, 2**20)
        check_number("video_ttl", self.video_ttl, 1.0, 10.0**7)
        check_number("shutdown_timeout", self.shutdown_timeout, 0.0, 10.0**5)
        check_choice("log_level", self.log_level, LOG_LEVELS)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with / and not end with /, as /pllava")
