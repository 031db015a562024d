//! What is compared, and at which sizes: vivid to vkms, XR24.

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
    pub const ALL: [Program; 7] = [
        Program::GstCopy,
        Program::GstDefault,
        Program::GstBest,
        Program::FloorEvents,
        Program::FloorBlocking,
        Program::DmaflowFifo,
        Program::DmaflowMailbox,
    ];

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
        }
    }

    /// At the last size only what the check of growth compares: frames are slow to make there.
    pub fn measured_at(self, size: Size) -> bool {
        let is_gst = matches!(self, Program::GstCopy | Program::GstDefault | Program::GstBest);
        size.rate == 60 || !is_gst
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
        let dmaflow = |present: &str| {
            format!(
                "dmaflow pipe --from vivid --to vkms --format XR24 --size {width}x{height} --fps {rate} \
                 --frames {frames} --present {present} --json"
            )
        };
        let line = match self {
            Program::GstCopy => gst("mmap", "skip-vsync=true"),
            Program::GstDefault => gst("dmabuf", ""),
            Program::GstBest => gst("dmabuf", "skip-vsync=true"),
            Program::FloorEvents => floor("events"),
            Program::FloorBlocking => floor("blocking"),
            Program::DmaflowFifo => dmaflow("fifo"),
            Program::DmaflowMailbox => dmaflow("mailbox"),
        };
        words(&line)
    }
}

/// Makes GStreamer look through its plug-ins.
pub fn warm_up() -> Vec<String> {
    words("gst-launch-1.0 -q videotestsrc num-buffers=1 ! fakesink")
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// A program that was built beside this one.
fn sibling(name: &str) -> String {
    let path = std::env::current_exe().unwrap_or_default().with_file_name(name);
    path.display().to_string()
}
