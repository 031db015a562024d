//! What is compared, and at which sizes: vivid to vkms, XR24 unless the program's name says another format.

use serde::Serialize;

/// A program in one of its ways of working.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// GStreamer, copying each frame.
    GstCopy,
    /// GStreamer as its elements are set by default.
    GstDefault,
    /// GStreamer at its best: no copy, and no wait for the vertical blank.
    GstBest,
    /// The floor with polls and events.
    FloorEvents,
    /// The floor with blocking calls.
    FloorBlocking,
    /// `dmaflow pipe --present fifo`.
    DmaflowFifo,
    /// `dmaflow pipe --present mailbox`.
    DmaflowMailbox,
    /// `dmaflow pipe --path copy`.
    DmaflowCopy,
    /// GStreamer, YUYV converted, at its best.
    GstYuyv,
    /// `dmaflow pipe` of YUYV, which no display takes.
    DmaflowYuyv,
    /// GStreamer, NV12 converted, at its best.
    GstNv12,
    /// `dmaflow pipe` of NV12, which the display takes from Linux 7.2 on.
    DmaflowNv12,
    /// `dmaflow pipe` of YUYV that a GPU converts.
    DmaflowGpu,
}

/// A size with the rate that vivid has there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    pub width: u32,
    pub height: u32,
    pub rate: u32,
}

impl Size {
    /// The first is where everything is measured; the last shows whether the cost grows with the picture.
    pub const ALL: [Size; 3] = [
        Size { width: 640, height: 360, rate: 60 },
        Size { width: 1280, height: 720, rate: 60 },
        Size { width: 1920, height: 1080, rate: 30 },
    ];
}

impl Program {
    pub const ALL: [Program; 13] = [
        Program::GstCopy,
        Program::GstDefault,
        Program::GstBest,
        Program::FloorEvents,
        Program::FloorBlocking,
        Program::DmaflowFifo,
        Program::DmaflowMailbox,
        Program::DmaflowCopy,
        Program::GstYuyv,
        Program::DmaflowYuyv,
        Program::GstNv12,
        Program::DmaflowNv12,
        Program::DmaflowGpu,
    ];

    /// The group of programs that copy each frame, by a name for `--only`.
    pub const COPIES: &str = "copies";
    /// The group of those that convert YUYV, the GPU beside the CPU.
    pub const GPU: &str = "gpu";

    /// Whether `--only` with this name means it: the program's, or its group's.
    pub fn is_called(self, name: &str) -> bool {
        name == self.name()
            || name == Program::COPIES && (self.copies() || self == Program::GstCopy)
            || name == Program::GPU && self.converts_yuyv()
    }

    /// Whether it is measured for its copies alone: at one size, by fewer runs, and without a count of its calls.
    pub fn copies(self) -> bool {
        use Program::{DmaflowCopy, DmaflowNv12, DmaflowYuyv, GstNv12, GstYuyv};
        matches!(self, DmaflowCopy | GstYuyv | DmaflowYuyv | GstNv12 | DmaflowNv12)
    }

    fn converts_yuyv(self) -> bool {
        matches!(self, Program::GstYuyv | Program::DmaflowYuyv | Program::DmaflowGpu)
    }

    /// Whether a frame costs so much that few runs tell: neither where in the display's cycle it comes nor the length of a run matters.
    pub fn is_dear(self) -> bool {
        self.copies() || self == Program::DmaflowGpu
    }

    /// The size at which the programs of `--only` with these names are measured, where it is one.
    pub fn size_of(names: &[String]) -> Option<Size> {
        match names {
            [name] if name == Program::COPIES => Some(Size::ALL[0]),
            [name] if name == Program::GPU => Some(Size::ALL[1]),
            _ => None,
        }
    }

    /// As in the table, the JSON, and `--only`.
    pub fn name(self) -> &'static str {
        match self {
            Program::GstCopy => "gst-copy",
            Program::GstDefault => "gst-default",
            Program::GstBest => "gst-best",
            Program::FloorEvents => "floor-events",
            Program::FloorBlocking => "floor-blocking",
            Program::DmaflowFifo => "dmaflow-fifo",
            Program::DmaflowMailbox => "dmaflow-mailbox",
            Program::DmaflowCopy => "dmaflow-copy",
            Program::GstYuyv => "gst-yuyv",
            Program::DmaflowYuyv => "dmaflow-yuyv",
            Program::GstNv12 => "gst-nv12",
            Program::DmaflowNv12 => "dmaflow-nv12",
            Program::DmaflowGpu => "dmaflow-gpu",
        }
    }

    /// What it is, for people.
    pub fn what(self) -> &'static str {
        match self {
            Program::GstCopy => "v4l2src io-mode=mmap ! kmssink skip-vsync=true (copies)",
            Program::GstDefault => "v4l2src io-mode=dmabuf ! kmssink (its defaults)",
            Program::GstBest => "v4l2src io-mode=dmabuf ! kmssink skip-vsync=true (its best)",
            Program::FloorEvents => "poll, DQBUF, ATOMIC, poll, read, QBUF",
            Program::FloorBlocking => "DQBUF, blocking ATOMIC, QBUF",
            Program::DmaflowFifo => "dmaflow pipe --present fifo",
            Program::DmaflowMailbox => "dmaflow pipe --present mailbox",
            Program::DmaflowCopy => "dmaflow pipe --path copy",
            Program::GstYuyv => {
                "v4l2src, YUY2 ! videoconvert, I420 ! videoconvert, BGRx ! kmssink skip-vsync=true (its best)"
            }
            Program::DmaflowYuyv => "dmaflow pipe --format YUYV",
            Program::GstNv12 => {
                "v4l2src, NV12 ! videoconvert, I420 ! videoconvert, BGRx ! kmssink skip-vsync=true (its best)"
            }
            Program::DmaflowNv12 => "dmaflow pipe --format NV12",
            Program::DmaflowGpu => {
                "dmaflow pipe --format YUYV --path convert (in the guest a GPU of software, lavapipe)"
            }
        }
    }

    /// At the last size only what the check of growth compares: frames are slow to make there.
    pub fn measured_at(self, size: Size) -> bool {
        let is_gst = matches!(self, Program::GstCopy | Program::GstDefault | Program::GstBest);
        match self {
            Program::DmaflowGpu => size == Size::ALL[1],
            _ if self.converts_yuyv() => size.rate == 60,
            _ if self.copies() => size == Size::ALL[0],
            _ => size.rate == 60 || !is_gst,
        }
    }

    /// The command that shows this many frames and ends. `mode` is the floor's, which is to have the same as dmaflow:
    /// what a frame costs depends on how the display's rate and the camera's lie to each other.
    pub fn command(self, size: Size, mode: Option<&str>, frames: u32) -> Vec<String> {
        let Size { width, height, rate } = size;
        let mode = mode.unwrap_or_default();
        let gst = |io: &str, sink: &str| {
            format!(
                "gst-launch-1.0 -q v4l2src device=/dev/video0 num-buffers={frames} io-mode={io} ! \
                 video/x-raw,format=BGRx,width={width},height={height},framerate={rate}/1 ! \
                 kmssink driver-name=vkms {sink}"
            )
        };
        let floor = |way: &str| format!("{} {way} {width}x{height} {rate} {frames} {mode}", sibling("bench-floor"));
        let converted = |format: &str| {
            format!(
                "gst-launch-1.0 -q v4l2src device=/dev/video0 num-buffers={frames} io-mode=mmap ! \
                 video/x-raw,format={format},width={width},height={height},framerate={rate}/1 ! \
                 videoconvert {CONVERT} ! video/x-raw,format=BGRx ! kmssink driver-name=vkms skip-vsync=true"
            )
        };
        let dmaflow = |format: &str, how: &str| {
            format!(
                "dmaflow pipe --from vivid --to vkms --format {format} --size {width}x{height} --fps {rate} \
                 --frames {frames} {how} --json"
            )
        };
        let line = match self {
            Program::GstCopy => gst("mmap", "skip-vsync=true"),
            Program::GstDefault => gst("dmabuf", ""),
            Program::GstBest => gst("dmabuf", "skip-vsync=true"),
            Program::FloorEvents => floor("events"),
            Program::FloorBlocking => floor("blocking"),
            Program::DmaflowFifo => dmaflow("XR24", "--present fifo"),
            Program::DmaflowMailbox => dmaflow("XR24", "--present mailbox"),
            Program::DmaflowCopy => dmaflow("XR24", "--path copy"),
            Program::GstYuyv => converted("YUY2"),
            Program::DmaflowYuyv => dmaflow("YUYV", ""),
            Program::GstNv12 => converted("NV12"),
            Program::DmaflowNv12 => dmaflow("NV12", ""),
            Program::DmaflowGpu => dmaflow("YUYV", "--path convert"),
        };
        words(&line)
    }
}

/// The cheapest settings of `videoconvert` that give the right colours; README.md tells what was tried.
const CONVERT: &str =
    "dither=none chroma-mode=none ! video/x-raw,format=I420 ! videoconvert dither=none chroma-mode=none";

/// Makes GStreamer look through its plug-ins.
pub fn warm_up() -> Vec<String> {
    words("gst-launch-1.0 -q videotestsrc num-buffers=1 ! fakesink")
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// A program that was built beside this one.
pub fn sibling(name: &str) -> String {
    let path = std::env::current_exe().unwrap_or_default().with_file_name(name);
    path.display().to_string()
}
