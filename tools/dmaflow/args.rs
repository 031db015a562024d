//! What may be written after `dmaflow`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::builder::styling::Styles;
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Below every help text.
const NAMES: &str = "\
SOURCE  /dev/videoN | a driver or card name (vivid) | pattern (a test card, no device needed) | unix:SOCKET (what is shared there)
SINK    /dev/dri/cardN | a driver name (vkms) | gbm | gbm:DEVICE | vulkan | vulkan:GPU (a DRM node, or a part of its name)
        png:FILE | y4m:FILE | raw:FILE | unix:SOCKET | null
        (y4m:- and raw:- write the frames to stdout, and the result to stderr)
DEVICE  /dev/dri/renderDN | /dev/dri/cardN | a driver name (amdgpu, vgem)

Exit status: 0 done, 1 failed, 2 wrong usage, 3 zero copy demanded and refused, 4 a frame was shown wrong";

/// Why `-` is no picture's file.
pub const NO_STDOUT: &str = "pictures do not go to stdout; they are written beside their place and renamed when they are complete, so \
     give a file (./- for one of that name)";

/// The name of a picture's file; `-` means stdout to whoever writes it, and pictures do not go there.
fn picture_file() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| if path.as_os_str() == "-" { Err(NO_STDOUT) } else { Ok(path) })
}

/// Moves frames between cameras and displays without copying them, and says exactly what it did.
#[derive(Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    styles = Styles::plain(),
    after_help = NAMES
)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Cameras, displays and allocators of this machine, and the formats that they share
    List(ListArgs),
    /// Tries every way from a source to a sink in every format, for real
    Probe(ProbeArgs),
    /// Frames from a source to a sink
    Pipe(PipeArgs),
    /// One source for many processes, which use unix:SOCKET as their source
    Share(ShareArgs),
    /// One frame of a camera, or what a display shows, as a PNG file
    Snap(SnapArgs),
    /// Every dma-buf of this machine: size, exporter, who holds it, attached devices
    Bufs(BufsArgs),
}

/// Below the help text of `list`.
const LIST: &str = "\
Shares are those whose sockets lie in $XDG_RUNTIME_DIR/dmaflow/, as those of
`dmaflow share --at $XDG_RUNTIME_DIR/dmaflow/NAME.sock` do. Each whose server lives is connected to
for a moment; a socket behind which a service waits is shown and not asked.";

#[derive(ClapArgs)]
#[command(after_help = LIST)]
pub struct ListArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Below the help text of `probe`.
const PROBE: &str = "\
SOURCE    /dev/videoN | a driver or card name (vivid) | pattern (a test card, no device needed)
SINK      /dev/dri/cardN | a driver name (vkms) | gbm | gbm:DEVICE | vulkan | vulkan:GPU | null
DEVICE    /dev/dri/renderDN | /dev/dri/cardN | a driver name (amdgpu, vgem)
GPU       a DRM node, or a part of its name (llvmpipe)

exported  the source's own buffers, used by the sink: no copy
reverse   buffers of the sink, of GBM, a dma-heap or udmabuf, that the source captures into: no copy
converted the GPU makes of each frame one that the sink takes
copied    the CPU copies each frame

A rung is ok when two frames that came that way have been shown, with gbm imported, or with vulkan read by the GPU. Pictures appear on the
display meanwhile; it is put back.
Exit status: 0 everything was tried, whatever was refused; 1 something failed; 2 wrong usage";

#[derive(ClapArgs)]
#[command(after_help = PROBE)]
pub struct ProbeArgs {
    /// Where frames come from [default: every camera]
    #[arg(long, value_name = "SOURCE", value_parser = NonEmptyStringValueParser::new())]
    pub from: Option<String>,
    /// Where frames go [default: every display, the first device with GBM, and the best GPU that is no software]
    #[arg(long, value_name = "SINK", value_parser = NonEmptyStringValueParser::new())]
    pub to: Option<String>,
    /// Size in pixels [default: what the source has]
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<(u32, u32)>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
#[command(after_help = NAMES)]
pub struct PipeArgs {
    /// Where frames come from [default: the first camera]
    #[arg(long, value_name = "SOURCE", value_parser = NonEmptyStringValueParser::new())]
    pub from: Option<String>,
    /// Where frames go [default: the first display]
    #[arg(long, value_name = "SINK", value_parser = NonEmptyStringValueParser::new())]
    pub to: Option<String>,
    #[command(flatten)]
    pub shape: Shape,
    /// Buffers in the source's queue [default: what the driver needs, and three]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub buffers: Option<u32>,
    /// Stop after N captured frames [default: go on until Ctrl-C]
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    pub frames: Option<u64>,
    /// Stop after S seconds
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// Without a copy where that works; or fail rather than copy; have a GPU convert always; copy always
    #[arg(long, value_enum, default_value_t = PathChoice::Auto, value_name = "PATH")]
    pub path: PathChoice,
    /// Capture into memory that WHO made, and into no other: the rung "reverse", or fail
    #[arg(long, value_enum, value_name = "WHO", conflicts_with = "path")]
    pub memory: Option<MakerChoice>,
    /// Show every frame in order, or always the newest
    #[arg(long, value_enum, default_value_t = PresentChoice::Fifo, value_name = "HOW")]
    pub present: PresentChoice,
    /// Compare each picture that the display reports (its CRC), or a GPU reads (its checksum), with the captured bytes
    #[arg(long)]
    pub verify: bool,
    /// The display wants rows of a multiple of BYTES, whatever its driver says (256 for many GPUs)
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub stride_align: Option<u32>,
    /// Leave the last picture that the display showed in FILE
    #[arg(long, value_name = "FILE.png", value_parser = picture_file())]
    pub snap: Option<PathBuf>,
    /// Test --verify: change one byte of the N-th frame (from 0) between capture and scanout
    #[arg(long, value_name = "N", requires = "verify")]
    pub corrupt_frame: Option<u64>,
    /// Keep copy-on-write views of the newest N frames, as a program would that looks at them for long
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub keep_views: Option<u32>,
    /// What the camera does when views leave it no buffer: detach the oldest (one copy), wait, or fail
    #[arg(long, value_enum, default_value_t = PolicyChoice::Detach, value_name = "WHAT", requires = "keep_views")]
    pub view_policy: PolicyChoice,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Below the help text of `share`.
const SHARE: &str = "\
SOURCE  /dev/videoN | a driver or card name (vivid) | pattern (a test card, no device needed);
        not unix:SOCKET: what is shared is not shared on
SOCKET  a path, or @NAME for a socket without a file. One in $XDG_RUNTIME_DIR/dmaflow/ is shown by
        `dmaflow list`; the folder is made, for this user alone, if it is missing

Consumers get the source's own buffers, for reading: nothing is copied, and what one writes into its
own view no other sees. One that is late gets the newest frame; one that keeps a frame for longer
than its lease loses it when the source has no other buffer to fill.
They map the buffers for reading alone. A device of theirs that writes into dma-bufs (a V4L2 node, a
GPU) is not held back by that: let in by --allow-uid and --allow-gid whom you trust that far.

The table of consumers (while it runs, if stderr is a terminal, and at the end; the same in JSON):
PID      the process that has connected; \"?\" if it cannot be seen from here (another namespace)
NAME     what it calls itself
UID      the user that it runs as
FRAMES   frames that were published to it, also those of them that were skipped later
SKIPPED  frames that it did not get: left out while it had its budget, or published and taken back
         before it took them
LEASES   frames that it has now, taken or not
LATENCY  from when a frame was published until it took it, in µs: the median of the last 128 that it
         took, as it says itself; \"?\" while it has said none (in JSON latency_us, with p99 and max)
STOLEN   frames that were taken back after it had taken them, because the source ran short of
         buffers and their lease had run out";

#[derive(ClapArgs)]
#[command(after_help = SHARE, mut_arg("reconnect", |arg| arg.hide(true)))]
pub struct ShareArgs {
    /// Where frames come from [default: the first camera]
    #[arg(long, value_name = "SOURCE", value_parser = NonEmptyStringValueParser::new())]
    pub from: Option<String>,
    /// Where consumers connect [default: the socket that systemd has passed]
    #[arg(long, value_name = "SOCKET", value_parser = NonEmptyStringValueParser::new())]
    pub at: Option<String>,
    /// The mode of the socket's file, octal, which is meant: 666 lets everybody connect, but with --allow-uid or --allow-gid those alone
    /// [default: 600; 660 with --group; 666 with --allow-uid or --allow-gid]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub mode: Option<u32>,
    /// The group of the socket's file, by name or number, whose users may connect if the mode lets them write
    #[arg(long, value_name = "GROUP", value_parser = NonEmptyStringValueParser::new())]
    pub group: Option<String>,
    /// Another user that may connect, by number; may be given several times
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,
    /// A group whose users may connect, by number; may be given several times
    #[arg(long, value_name = "GID")]
    pub allow_gid: Vec<u32>,
    /// Consumers that ask for it can write into the buffers as well, as Mesa's lavapipe must to import them
    #[arg(long)]
    pub writable: bool,
    /// How long a consumer may keep a frame at least, in ms [default: three frame times]
    #[arg(long, value_name = "MS", value_parser = millis)]
    pub lease: Option<Duration>,
    /// Frames that a consumer may have at a time; a display that shows every frame needs three or four
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=15))]
    pub budget: u32,
    #[command(flatten)]
    pub shape: Shape,
    /// Buffers in the source's queue [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub buffers: Option<u32>,
    /// Stop after N captured frames [default: go on until Ctrl-C]
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    pub frames: Option<u64>,
    /// Stop after S seconds
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The shape of a source's frames.
#[derive(ClapArgs, Clone)]
pub struct Shape {
    /// Pixel format, as DRM or V4L2 writes it (XR24, NV12, NM12) [default: one that both ends take]
    #[arg(long, value_name = "FOURCC")]
    pub format: Option<String>,
    /// Size in pixels [default: what the source has]
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<(u32, u32)>,
    /// Frames a second [default: the source's fastest, up to 60]
    #[arg(long, value_name = "N")]
    pub fps: Option<f64>,
    /// Bytes from one row to the next [default: what the source has]
    #[arg(long, value_name = "BYTES")]
    pub stride: Option<u32>,
    /// Input of the camera
    #[arg(long, value_name = "N")]
    pub input: Option<u32>,
    /// Set a control of the camera first; may be given several times
    #[arg(long = "control", value_name = "NAME=VALUE", value_parser = control)]
    pub controls: Vec<(String, i64)>,
    /// When what is shared at unix:SOCKET ends, wait until it is there again
    #[arg(long)]
    pub reconnect: bool,
    /// Of what is shared at unix:SOCKET, buffers to write to are asked for if there are such: devices may need that to import them.
    #[arg(skip)]
    pub writable: bool,
}

#[derive(ClapArgs)]
#[command(after_help = NAMES)]
pub struct SnapArgs {
    /// A source, or a display
    #[arg(value_name = "SOURCE|DISPLAY", value_parser = NonEmptyStringValueParser::new())]
    pub of: String,
    /// The file to write
    #[arg(value_name = "FILE.png", value_parser = picture_file())]
    pub file: PathBuf,
    #[command(flatten)]
    pub shape: Shape,
    /// How to read a display: the framebuffers of its planes, or its hardware's writeback [default: the latter where it works]
    #[arg(long, value_enum)]
    pub via: Option<Via>,
}

/// Below the help text of `bufs`.
const BUFS: &str = "\
A buffer counts once in all, by its inode, and once for each process that holds it; a share divides it among them.
Age is the time since the buffer was exported; \"?\" is what could not be seen: all is seen as root.
Marked is what only grows: more at four looks or more, two seconds or more apart, and never less.";

#[derive(ClapArgs)]
#[command(after_help = BUFS)]
pub struct BufsArgs {
    /// Print one JSON object, with --watch one a line for each look
    #[arg(long)]
    pub json: bool,
    /// Look again and again until Ctrl-C, and mark what only grows
    #[arg(long)]
    pub watch: bool,
    /// Seconds from one look to the next
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval, requires = "watch")]
    pub interval: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyChoice {
    Detach,
    Wait,
    Error,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PathChoice {
    // Without a copy where that works.
    Auto,
    // Fail rather than copy.
    ZeroCopy,
    // Have a GPU convert.
    Convert,
    // Always copy.
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MakerChoice {
    // The sink: a display's dumb buffers, the buffers of a device with GBM.
    Sink,
    // The GBM of the display's card.
    #[cfg(feature = "gbm")]
    Gbm,
    // The system dma-heap.
    Heap,
    // udmabuf over a memfd.
    Udmabuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PresentChoice {
    // Every frame, in order.
    Fifo,
    // The newest frame.
    Mailbox,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Via {
    // The framebuffers of its planes, composed here.
    Framebuffers,
    // The display hardware's own writeback.
    Writeback,
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let error = || format!("\"{text}\" is not a size such as 640x360");
    let (width, height) = text.split_once(['x', 'X']).ok_or_else(error)?;
    match (width.parse(), height.parse()) {
        (Ok(width), Ok(height)) if width > 0 && height > 0 => Ok((width, height)),
        _ => Err(error()),
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("\"{text}\" is not a mode such as 660"))
}

fn millis(text: &str) -> Result<Duration, String> {
    let millis = text.parse().ok().filter(|millis| (1.0..=3_600_000.0).contains(millis));
    millis
        .map(|millis: f64| Duration::from_secs_f64(millis / 1000.0))
        .ok_or_else(|| format!("\"{text}\" is not a number of ms from 1 to 3600000"))
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.05..=86400.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("\"{text}\" is not a number of seconds from 0.05 to 86400"))
}

fn control(text: &str) -> Result<(String, i64), String> {
    let parts = text
        .split_once('=')
        .and_then(|(name, value)| Some((name.to_owned(), value.parse().ok()?)));
    parts.ok_or_else(|| format!("\"{text}\" is not a control such as brightness=128"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn intervals() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        assert!(
            ["0", "-1", "nan", "inf", "1e9", "x", ""]
                .into_iter()
                .all(|text| interval(text).is_err())
        );
    }

    #[test]
    fn modes_and_leases() {
        assert_eq!((mode("660"), mode("0600")), (Ok(0o660), Ok(0o600)));
        assert!(["", "1000", "8", "-1", "x"].into_iter().all(|text| mode(text).is_err()));
        assert_eq!(millis("2.5"), Ok(Duration::from_micros(2500)));
        assert!(
            ["", "0", "-1", "nan", "inf", "1e9"]
                .into_iter()
                .all(|text| millis(text).is_err())
        );
    }

    #[test]
    fn sizes_and_controls() {
        assert_eq!(size("640x360"), Ok((640, 360)));
        assert!(size("0x360").is_err() && size("640").is_err() && size("ax1").is_err());
        assert_eq!(control("gain=-3"), Ok(("gain".into(), -3)));
        assert!(control("gain").is_err() && control("gain=x").is_err());
    }
}
