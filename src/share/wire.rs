//! What server and consumer say to each other over the socket.
//!
//! A socket of type `SOCK_SEQPACKET`: a message is a packet, and comes whole or not at all. Numbers are little endian; nothing is aligned.
//! Every message begins with
//!
//! ```text
//!  0  4  "dmaf"
//!  4  2  version, 1
//!  6  2  kind
//! ```
//!
//! and goes on by its kind. The head, and the message `end`, are the same in every version: whoever hears another version says so by an end, and
//! hangs up. Texts are UTF-8 without a zero byte, after a 2-byte length of at most 256.
//! They are for people, and end up on terminals: whoever sends one puts "?" for each control character (U+0000 to U+001F, U+007F to
//! U+009F), and whoever gets one does so too, for the other side need not have done it.
//!
//! | kind | from, fds | fields after the head |
//! |---|---|---|
//! | 1 hello | consumer | 4 wishes (bit 0: buffers that it can write to, or none), text: its name |
//! | 2 welcome | server; the ring, the consumer's end of the bell | 4 frames it may have at a time, 4 bits (bit 0: it may send fences; the others are 0), text: the source |
//! | 3 format | server | 4 generation, 4 buffers, 8 µs it may keep a frame of this generation (the lease), 8 frames in 1,000,000 s (0: not known), 8 µs that the server waits for a frame of its source at most (0: for any time), 4 DRM code (0: none), 4 V4L2 code (0: none), 4 width, 4 height, 8 modifier (`DRM_FORMAT_MOD_INVALID`: not stated), 1 encoding, 1 range, 1 colour planes, 1 memory planes, for each colour plane 4 memory plane, 4 offset, 4 stride, for each memory plane 8 bytes |
//! | 4 buffer | server; one fd for each memory plane | 4 generation, 4 index, 8 identity: the inode (`st_ino` of fstat(2)) of the first memory plane's descriptor |
//! | 5 end | either | 2 reason, text |
//! | 6 fence | either; a sync file | 8 position in the ring |
//!
//! A consumer says hello, and gets a welcome and the format with its buffers, or an end. When the source changes its format there is a new
//! generation, before the first frame of it is in the ring: a consumer that finds a frame of a generation or a buffer that it does not
//! know reads the socket first. The buffers of generations before are gone when it has released their last frame.
//!
//! # Fences
//! A frame that a device still writes is published with its **acquire fence**: the server sends the message `fence` with the position that
//! the frame will have in the ring, and then publishes it there, marked as fenced (`entry.rs`). So a consumer that has taken such an entry
//! finds the message in its socket, behind those of entries before, and at once. Positions of such messages only grow. Those of frames that
//! it was too late for it closes unused: whoever takes an entry has no use for fences of positions before. Which is why a consumer reads
//! its socket whenever there is something and it has no frame to take: with some 16 of them unread the server skips frames that have
//! a fence for it, and those that it had not taken, until it has read all but a few.
//!
//! A frame that the consumer's own device still reads when it is done with it may be given back with a **release fence**, if the welcome
//! says so (to consumers of the server's own user: who sends descriptors can make the server wait when it closes them). The consumer sends the message `fence` with the frame's position, and then gives it back as fenced (`ring.rs`). The server does not have the buffer
//! filled before the fence has signalled, and until then the frame counts as one that the consumer has: against its budget, and against
//! its lease. A fence that takes longer than the lease is not waited for any more when the source runs short of buffers. A consumer need
//! not do so: it may as well give the frame back when the fence has signalled.
//!
//! Either side closes what comes if it is no sync file (`anon_inode:sync_file` in `/proc/self/fd`), and ends the connection: a descriptor of
//! another sort could make it wait. The server does so too with a fence for a position that the consumer has never had, or a second one.
//!
//! Encodings: 0 BT.601, 1 BT.709, 2 BT.2020. Ranges: 0 limited, 1 full. Reasons: 0 the source has ended, 1 the source has failed, 2
//! refused, 3 the other side has broken the protocol, 4 there is no place at the moment.
//!
//! A buffer's descriptors are those of dma-bufs or of memfds that are sealed against shrinking, and are for reading alone unless the server
//! says otherwise: map them privately, or shared for reading. A consumer that cannot do with that says so by its wish, and is refused.
//!
//! The ring's area: see `ring.rs` and `area.rs`; what the words of its entries are: `entry.rs`; the bells: `bell.rs`.

use crate::format::{Colour, Encoding, Format, Fourcc, Layout, MAX_PLANES, Modifier, PlaneLayout, Range};
use crate::frame::MAX_SLOTS;

/// The version that is spoken here.
pub(super) const VERSION: u16 = 1;
/// No message is longer.
pub(super) const MAX_MESSAGE: usize = 512;
/// No message carries more fds.
pub(super) const MAX_FDS: usize = MAX_PLANES;
const MAX_TEXT: usize = 256;
/// The kind of the message that is the same in every version.
const END: u16 = 5;
const MAGIC: [u8; 4] = *b"dmaf";
const INVALID_MODIFIER: u64 = 0x00ff_ffff_ffff_ffff;

/// A message, without its fds.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Message {
    Hello {
        writable: bool,
        name: String,
    },
    Welcome(Welcome),
    Format(Shape),
    Buffer {
        generation: u32,
        index: u32,
        identity: u64,
    },
    End {
        reason: Reason,
        text: String,
    },
    /// Of the frame at this position of the ring.
    Fence {
        position: u64,
    },
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Welcome {
    pub budget: u32,
    /// Whether the consumer may send release fences.
    pub fences: bool,
    pub source: String,
}

/// What the times of a generation's frames are, which may change with their format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Timing {
    /// How long a frame may be kept at least.
    pub lease_us: u64,
    /// Frames in 1,000,000 s; 0 if that is not known.
    pub rate_micro: u64,
    /// How long the server waits for a frame of its source at most; 0 for any time.
    pub watchdog_us: u64,
}

/// What the buffers of a generation are like.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Shape {
    pub generation: u32,
    pub buffers: u32,
    pub timing: Timing,
    pub layout: Layout,
    /// Bytes of each memory plane; as many as the layout has.
    pub lens: Vec<u64>,
}

/// Why a connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reason {
    Ended,
    Failed,
    Refused,
    Broken,
    Full,
}

/// Bytes that are no message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error("it ends in the middle")]
    Short,
    #[error("{0} bytes are left over")]
    Long(usize),
    #[error("it does not begin with \"dmaf\"")]
    Magic,
    #[error("it is of version {0}; {VERSION} is spoken here")]
    Version(u16),
    #[error("it is of an unknown kind, {0}")]
    Kind(u16),
    #[error("its {0} cannot be")]
    Value(&'static str),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, Malformed> {
        let len = usize::from(self.u16()?);
        if len > MAX_TEXT {
            return Err(Malformed::Value("text's length"));
        }
        let text = str::from_utf8(self.bytes(len)?).ok().filter(|text| !text.contains('\0'));
        let text = text.ok_or(Malformed::Value("text"))?;
        // None is longer without than with.
        let mut shown = String::with_capacity(len);
        shown.extend(without_controls(text));
        Ok(shown)
    }
}

/// A text whose control characters a terminal would obey, or a reader not see.
fn without_controls(text: &str) -> impl Iterator<Item = char> + '_ {
    text.chars()
        .map(|character| if character.is_control() { '?' } else { character })
}

/// A text as far as it fits, cut between characters.
fn put_text(to: &mut Vec<u8>, text: &str) {
    let mut fitting = String::with_capacity(MAX_TEXT);
    for character in without_controls(text) {
        if fitting.len() + character.len_utf8() > MAX_TEXT {
            break;
        }
        fitting.push(character);
    }
    // At most 256.
    to.extend((fitting.len() as u16).to_le_bytes());
    to.extend(fitting.bytes());
}

impl Message {
    /// The message's bytes, [`MAX_MESSAGE`] at most.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_MESSAGE);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.kind().to_le_bytes());
        match self {
            Message::Hello { writable, name } => {
                bytes.extend(u32::from(*writable).to_le_bytes());
                put_text(&mut bytes, name);
            }
            Message::Welcome(welcome) => {
                bytes.extend(welcome.budget.to_le_bytes());
                bytes.extend(u32::from(welcome.fences).to_le_bytes());
                put_text(&mut bytes, &welcome.source);
            }
            Message::Format(shape) => shape.encode(&mut bytes),
            Message::Buffer { generation, index, identity } => {
                bytes.extend(generation.to_le_bytes());
                bytes.extend(index.to_le_bytes());
                bytes.extend(identity.to_le_bytes());
            }
            Message::End { reason, text } => {
                bytes.extend((*reason as u16).to_le_bytes());
                put_text(&mut bytes, text);
            }
            Message::Fence { position } => bytes.extend(position.to_le_bytes()),
        }
        bytes
    }

    fn kind(&self) -> u16 {
        match self {
            Message::Hello { .. } => 1,
            Message::Welcome(_) => 2,
            Message::Format(_) => 3,
            Message::Buffer { .. } => 4,
            Message::End { .. } => END,
            Message::Fence { .. } => 6,
        }
    }

    /// How many fds belong to it; those of a buffer are by its generation's format.
    pub(super) fn fds(&self) -> Option<usize> {
        match self {
            Message::Welcome(_) => Some(2),
            Message::Fence { .. } => Some(1),
            Message::Buffer { .. } => None,
            Message::Hello { .. } | Message::Format(_) | Message::End { .. } => Some(0),
        }
    }

    /// A packet's message. Allocates no more than the text has, or the sizes of four memory planes.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(super) fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
        let mut from = Reader(bytes);
        if from.array()? != MAGIC {
            return Err(Malformed::Magic);
        }
        let (version, kind) = (from.u16()?, from.u16()?);
        if version != VERSION && kind != END {
            return Err(Malformed::Version(version));
        }
        let message = match kind {
            1 => {
                let wishes = from.u32()?;
                if wishes > 1 {
                    return Err(Malformed::Value("wish"));
                }
                Message::Hello { writable: wishes == 1, name: from.text()? }
            }
            2 => {
                let (budget, bits) = (from.u32()?, from.u32()?);
                if bits > 1 {
                    return Err(Malformed::Value("bit of a welcome"));
                }
                Message::Welcome(Welcome { budget, fences: bits == 1, source: from.text()? })
            }
            3 => Message::Format(Shape::decode(&mut from)?),
            4 => {
                let (generation, index, identity) = (from.u32()?, from.u32()?, from.u64()?);
                if index >= MAX_SLOTS {
                    return Err(Malformed::Value("buffer's index"));
                }
                Message::Buffer { generation, index, identity }
            }
            END => {
                let reasons = [Reason::Ended, Reason::Failed, Reason::Refused, Reason::Broken, Reason::Full];
                let reason = reasons.get(usize::from(from.u16()?)).copied();
                Message::End { reason: reason.ok_or(Malformed::Value("reason"))?, text: from.text()? }
            }
            6 => match from.u64()? {
                0 => return Err(Malformed::Value("position")),
                position => Message::Fence { position },
            },
            kind => return Err(Malformed::Kind(kind)),
        };
        match from.0.len() {
            0 => Ok(message),
            left => Err(Malformed::Long(left)),
        }
    }
}

impl Shape {
    fn encode(&self, to: &mut Vec<u8>) {
        let layout = &self.layout;
        let drm = layout.format().drm().map_or(0, |code| code.0);
        let v4l2 = layout.format().v4l2().next().map_or(0, |(code, _)| code.0);
        let Timing { lease_us, rate_micro, watchdog_us } = self.timing;
        to.extend(self.generation.to_le_bytes());
        to.extend(self.buffers.to_le_bytes());
        for number in [lease_us, rate_micro, watchdog_us] {
            to.extend(number.to_le_bytes());
        }
        for number in [drm, v4l2, layout.width(), layout.height()] {
            to.extend(number.to_le_bytes());
        }
        to.extend(layout.modifier().map_or(INVALID_MODIFIER, Modifier::to_drm).to_le_bytes());
        let encoding = match layout.colour().encoding {
            Encoding::Bt601 => 0,
            Encoding::Bt709 => 1,
            Encoding::Bt2020 => 2,
        };
        let range = match layout.colour().range {
            Range::Limited => 0,
            Range::Full => 1,
        };
        // Neither has more than four.
        to.extend([encoding, range, layout.planes().len() as u8, self.lens.len() as u8]);
        for plane in layout.planes() {
            for number in [plane.memory, plane.offset, plane.stride] {
                to.extend(number.to_le_bytes());
            }
        }
        for len in &self.lens {
            to.extend(len.to_le_bytes());
        }
    }

    fn decode(from: &mut Reader<'_>) -> Result<Shape, Malformed> {
        let (generation, buffers) = (from.u32()?, from.u32()?);
        if !(1..=MAX_SLOTS).contains(&buffers) {
            return Err(Malformed::Value("number of buffers"));
        }
        let timing = Timing { lease_us: from.u64()?, rate_micro: from.u64()?, watchdog_us: from.u64()? };
        let (drm, v4l2) = (from.u32()?, from.u32()?);
        let format = match (drm, v4l2) {
            (0, v4l2) => Format::from_v4l2(Fourcc(v4l2)).map(|(format, _)| format),
            (drm, _) => Format::from_drm(Fourcc(drm)),
        };
        let format = format.ok_or(Malformed::Value("format"))?;
        let size = (from.u32()?, from.u32()?);
        let modifier = Modifier::from_drm(from.u64()?);
        let encoding = match from.u8()? {
            0 => Encoding::Bt601,
            1 => Encoding::Bt709,
            2 => Encoding::Bt2020,
            _ => return Err(Malformed::Value("encoding")),
        };
        let range = match from.u8()? {
            0 => Range::Limited,
            1 => Range::Full,
            _ => return Err(Malformed::Value("range")),
        };
        let (planes, memories) = (usize::from(from.u8()?), usize::from(from.u8()?));
        if planes > MAX_PLANES || !(1..=MAX_PLANES).contains(&memories) {
            return Err(Malformed::Value("number of planes"));
        }
        let mut places = [PlaneLayout::default(); MAX_PLANES];
        for place in &mut places[..planes] {
            *place = PlaneLayout { memory: from.u32()?, offset: from.u32()?, stride: from.u32()? };
        }
        let lens = (0..memories).map(|_| from.u64()).collect::<Result<Vec<_>, _>>()?;
        let layout = Layout::new(format, size, &places[..planes]).map_err(|_| Malformed::Value("layout"))?;
        let sizes: Vec<usize> = lens.iter().map(|&len| usize::try_from(len).unwrap_or(usize::MAX)).collect();
        layout.check(&sizes).map_err(|_| Malformed::Value("layout"))?;
        let layout = layout.with_modifier(modifier).with_colour(Colour { encoding, range });
        Ok(Shape { generation, buffers, timing, layout, lens })
    }
}

#[cfg(test)]
mod tests;
