//! What a receiver gets from its server: an answer when it connects, and buffers. Nothing of it is believed before it is checked.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statfs::{FsType, fstatfs};

use super::give::identity;
use super::socket::Place;
use super::wire::{Message, Shape};
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::frame::Buffer;
use crate::memory::Memory;

/// Generations that may be announced and not followed yet.
const COMING: usize = 64;

/// `DMA_BUF_MAGIC` of linux/magic.h.
const DMA_BUF: FsType = FsType(0x444d_4142);

/// Buffers of one shape, as far as they have come.
#[derive(Debug)]
pub(super) struct Generation {
    pub shape: Shape,
    pub buffers: Vec<Buffer>,
}

impl Generation {
    pub(super) fn is_whole(&self) -> bool {
        self.buffers.len() == self.shape.buffers as usize
    }
}

pub(super) fn nonsense(place: &Place, why: &str) -> Error {
    Error::new(Kind::Invalid, "join", place.to_string()).because(why.to_owned())
}

/// Takes a message that tells of buffers. The error says what is wrong with it.
pub(super) fn learn(
    coming: &mut VecDeque<Generation>,
    message: Message,
    fds: Vec<OwnedFd>,
) -> std::result::Result<(), String> {
    match message {
        Message::Format(shape) => {
            if coming.back().is_some_and(|last| !last.is_whole()) {
                return Err("a format follows another before its buffers".to_owned());
            }
            if coming.len() >= COMING {
                return Err("it announces formats without frames".to_owned());
            }
            coming.push_back(Generation { shape, buffers: Vec::new() });
            Ok(())
        }
        Message::Buffer { generation, index, identity: said } => {
            let last = coming
                .back_mut()
                .filter(|last| last.shape.generation == generation && !last.is_whole());
            let last = last.ok_or("a buffer belongs to no format")?;
            if index as usize != last.buffers.len() || fds.len() != last.shape.lens.len() {
                return Err(format!("buffer {index} of generation {generation} comes out of turn"));
            }
            let buffer = make_buffer(&last.shape, fds).map_err(|error| error.line())?;
            if identity(&buffer).map_err(|error| error.line())? != said {
                return Err(format!("buffer {index} is not what it is said to be"));
            }
            last.buffers.push(buffer);
            Ok(())
        }
        _ => Err("a message is a consumer's, or comes twice".to_owned()),
    }
}

/// A buffer of another process's memory: a dma-buf, whose size is fixed, or a memfd that cannot be made shorter.
fn make_buffer(shape: &Shape, fds: Vec<OwnedFd>) -> Result<Buffer> {
    let memory = |fd: OwnedFd| -> Result<Memory> {
        let about = || "a shared buffer";
        let kind = fstatfs(&fd).context("look at", about)?.filesystem_type();
        if kind == DMA_BUF {
            return Ok(Memory::DmaBuf(DmaBuf::new(fd)?));
        }
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).unwrap_or(0);
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            let error = Error::new(Kind::Invalid, "use", "a shared buffer");
            return Err(error.because("it is neither a dma-buf nor a memfd that is sealed against shrinking"));
        }
        Ok(Memory::Plain(fd))
    };
    let memory = fds.into_iter().map(memory).collect::<Result<Vec<_>>>()?;
    let lens: Vec<_> = shape
        .lens
        .iter()
        .map(|&len| usize::try_from(len).unwrap_or(usize::MAX))
        .collect();
    Buffer::new(shape.layout, memory, &lens)
}
