//! `Buffer`: memory with a layout.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::dmabuf::{DmaBuf, Identity, is_read_only};
use crate::error::{Error, Kind, Result};
use crate::format::{Layout, MAX_PLANES};
use crate::memory::{Access, CpuAccess, Mapping, Memory, Private, Span};
use std::os::fd::AsFd;

/// Memory with a layout: one [`Memory`] for each memory plane. Clones are cheap and share the memory, which lives as long as
/// anyone holds it, whatever becomes of the device that made it.
#[derive(Clone, Debug)]
pub struct Buffer(Arc<Inner>);

/// Follows a [`Buffer`] without keeping it alive; what caches hold.
#[derive(Clone, Debug)]
pub struct WeakBuffer(Weak<Inner>);

#[derive(Debug)]
struct Inner {
    layout: Layout,
    memory: Vec<Memory>,
    lens: [usize; MAX_PLANES],
    mappings: OnceLock<Vec<Mapping>>,
    private: Mutex<PrivateMappings>,
    /// For writing. Locked while it is written: two writers would tear each other's picture.
    writable: Mutex<Vec<Mapping>>,
    /// Whether another process may take it back.
    lent: bool,
}

/// Private mappings that no view uses now: one [`Private`] for each memory plane in each.
#[derive(Debug, Default)]
struct PrivateMappings {
    idle: Vec<Vec<Private>>,
    /// The exporter does not map privately.
    refused: bool,
}

/// So many are kept: as many views of one frame as are open at a time in most programs.
const IDLE_MAPPINGS: usize = 4;

impl Buffer {
    /// Joins memory and layout. `lens` are the bytes of each memory plane that may be used.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if a row of the layout lies outside its memory plane, or a length is more than the memory has.
    pub fn new(layout: Layout, memory: Vec<Memory>, lens: &[usize]) -> Result<Buffer> {
        Buffer::make(layout, memory, lens, false)
    }

    /// The same of memory that is [lent](Buffer::is_lent) by another process.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub(crate) fn lent(layout: Layout, memory: Vec<Memory>, lens: &[usize]) -> Result<Buffer> {
        Buffer::make(layout, memory, lens, true)
    }

    fn make(layout: Layout, memory: Vec<Memory>, lens: &[usize], lent: bool) -> Result<Buffer> {
        let bad = || Error::new(Kind::Invalid, "make a buffer of", layout.to_string());
        if memory.len() != lens.len() || memory.len() > MAX_PLANES {
            return Err(bad().because(format!("{} memory planes with {} lengths", memory.len(), lens.len())));
        }
        for (plane, (memory, &len)) in memory.iter().zip(lens).enumerate() {
            let there = memory.bytes()?;
            if len > there {
                return Err(bad().because(format!("{len} bytes of memory plane {plane}, which has {there}")));
            }
        }
        layout.check(lens).map_err(|cause| bad().because(cause))?;
        let mut all = [0; MAX_PLANES];
        all[..lens.len()].copy_from_slice(lens);
        let inner = Inner {
            layout,
            memory,
            lens: all,
            mappings: OnceLock::new(),
            private: Mutex::default(),
            writable: Mutex::default(),
            lent,
        };
        Ok(Buffer(Arc::new(inner)))
    }

    /// Whether another process fills the memory and lends it frame by frame, as what came over a share is
    /// ([`Receiver`](crate::share::Receiver)): that process may take a frame back and fill the buffer with the next, whoever still reads it
    /// here. So it is not given to a third, who could not be told ([`Server`](crate::share::Server) refuses it). One load.
    pub fn is_lent(&self) -> bool {
        self.0.lent
    }

    /// Format, size and where the colour planes lie.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// The memory planes.
    pub fn memory(&self) -> &[Memory] {
        &self.0.memory
    }

    /// The dma-buf of memory plane `memory`; `None` where the memory is none.
    pub fn dma_buf(&self, memory: u32) -> Option<&DmaBuf> {
        match self.0.memory.get(memory as usize)? {
            Memory::DmaBuf(dma_buf) => Some(dma_buf),
            Memory::Plain(_) => None,
        }
    }

    /// The bytes of each memory plane that may be used.
    pub fn memory_lens(&self) -> &[usize] {
        &self.0.lens[..self.0.memory.len()]
    }

    /// Takes bytes used of each memory plane for no more than there are.
    pub(crate) fn limit(&self, bytes_used: &mut [u32; MAX_PLANES]) {
        // Planes that are not there have 0.
        for (used, len) in bytes_used.iter_mut().zip(self.0.lens) {
            *used = (*used).min(u32::try_from(len).unwrap_or(u32::MAX));
        }
    }

    /// The same dma-bufs with another layout; the very same handle if it has that layout already. Lent memory stays lent.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if a row lies outside its memory plane, or a memory plane is no dma-buf.
    pub fn with_layout(&self, layout: Layout) -> Result<Buffer> {
        if *self.layout() == layout {
            return Ok(self.clone());
        }
        let planes = (0u32..).zip(self.memory());
        let shared = planes.map(|(plane, _)| self.dma_buf(plane).cloned().map(Memory::DmaBuf));
        let not_shared = || Error::new(Kind::Invalid, "share the memory of", self.layout().to_string());
        let memory = shared.collect::<Option<Vec<_>>>();
        let memory = memory.ok_or_else(|| not_shared().because("a memory plane is no dma-buf"))?;
        Buffer::make(layout, memory, self.memory_lens(), self.0.lent)
    }

    /// Whether every memory plane is a dma-buf, so that devices can import it.
    pub fn is_dma_buf(&self) -> bool {
        self.0.memory.iter().all(|memory| matches!(memory, Memory::DmaBuf(_)))
    }

    /// Whether both are the same handle: one comparison of addresses.
    pub fn same_handle(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether both are the same memory with the same layout, by the kernel's identities.
    pub fn same_memory(&self, other: &Buffer) -> bool {
        self.same_handle(other)
            || (self.is_dma_buf() && self.layout() == other.layout() && self.identities().eq(other.identities()))
    }

    /// A reference that does not keep the memory alive.
    pub fn downgrade(&self) -> WeakBuffer {
        WeakBuffer(Arc::downgrade(&self.0))
    }

    /// Opens the buffer for reading by the CPU. Maps the memory the first time (kept for the buffer's life); then one
    /// system call for each memory plane at either end. No allocation after the first time.
    ///
    /// # Errors
    /// If the exporter does not allow a mapping, or refuses CPU access.
    pub fn read(&self) -> Result<BufferReader<'_>> {
        let mappings = match self.0.mappings.get() {
            Some(mappings) => mappings,
            None => {
                let made = self.map(Access::Read)?;
                self.0.mappings.get_or_init(|| made)
            }
        };
        Ok(BufferReader { layout: &self.0.layout, mappings, _access: self.begin(Access::Read)? })
    }

    /// Opens the buffer for writing by the CPU; as [`Buffer::read`] otherwise. A second writer waits for the first. What reads
    /// the memory meanwhile, a device or a [`BufferReader`], sees the picture half done: the caller sees to it that nothing does.
    ///
    /// # Errors
    /// If the exporter does not allow a mapping for writing, or refuses CPU access.
    pub fn write(&self) -> Result<BufferWriter<'_>> {
        // A writer that panicked left a picture half done and nothing else.
        let mut mappings = self.0.writable.lock().unwrap_or_else(PoisonError::into_inner);
        if mappings.is_empty() {
            let read_only = |memory: &Memory| is_read_only(memory.as_fd());
            *mappings =
                self.map(Access::ReadWrite)
                    .map_err(|error| match self.0.memory.iter().any(read_only) {
                        true => error
                            .repair("it is shared for reading alone: write into a view, or share it with --writable"),
                        false => error,
                    })?;
        }
        Ok(BufferWriter { layout: &self.0.layout, mappings, access: self.begin(Access::ReadWrite)? })
    }

    /// Begins CPU access to every memory plane that is a dma-buf.
    fn begin(&self, how: Access) -> Result<[Option<CpuAccess<'_>>; MAX_PLANES]> {
        let mut access = [const { None }; MAX_PLANES];
        for (slot, memory) in access.iter_mut().zip(&self.0.memory) {
            if let Memory::DmaBuf(dma_buf) = memory {
                *slot = Some(CpuAccess::begin(dma_buf, how)?);
            }
        }
        Ok(access)
    }

    /// Maps every memory plane anew.
    ///
    /// # Errors
    /// If the exporter does not allow it.
    pub(crate) fn map(&self, access: Access) -> Result<Vec<Mapping>> {
        self.0
            .memory
            .iter()
            .zip(self.0.lens)
            .map(|(memory, len)| Mapping::new(memory.as_fd(), len, access))
            .collect()
    }

    /// A private mapping of each memory plane in which nothing was written: one that a view has left, else a new one. `None` where the
    /// exporter does not map privately.
    ///
    /// # Errors
    /// What `mmap` says for want of memory or mappings.
    pub(crate) fn take_private(&self) -> Result<Option<Vec<Private>>> {
        let mut private = self.0.private.lock().unwrap_or_else(PoisonError::into_inner);
        if private.refused {
            return Ok(None);
        }
        if let Some(idle) = private.idle.pop() {
            return Ok(Some(idle));
        }
        let planes = self.0.memory.iter().zip(self.0.lens);
        let mapped = planes
            .map(|(memory, len)| Private::map(memory, len))
            .collect::<Result<Option<Vec<_>>>>()?;
        private.refused = mapped.is_none();
        Ok(mapped)
    }

    /// Whether a view of it would show its own pages; otherwise one would be a copy. Maps it the first time, for the views to come.
    pub(crate) fn maps_privately(&self) -> bool {
        match self.take_private() {
            Ok(Some(planes)) => {
                self.keep_private(planes);
                true
            }
            _ => false,
        }
    }

    /// Keeps mappings in which nothing is written for the next view.
    pub(crate) fn keep_private(&self, planes: Vec<Private>) {
        let mut private = self.0.private.lock().unwrap_or_else(PoisonError::into_inner);
        if private.idle.len() < IDLE_MAPPINGS {
            private.idle.push(planes);
        }
    }

    fn identities(&self) -> impl Iterator<Item = Identity> {
        self.0.memory.iter().filter_map(|memory| match memory {
            Memory::DmaBuf(dma_buf) => Some(dma_buf.identity()),
            Memory::Plain(_) => None,
        })
    }
}

impl WeakBuffer {
    /// Whether nobody holds the buffer any more.
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }

    /// The buffer, if somebody still holds it.
    pub fn upgrade(&self) -> Option<Buffer> {
        self.0.upgrade().map(Buffer)
    }

    /// Whether it follows this very handle: one comparison of addresses.
    pub fn follows(&self, buffer: &Buffer) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&buffer.0))
    }
}

/// A buffer open for reading by the CPU; rows are copied out.
#[derive(Debug)]
pub struct BufferReader<'a> {
    layout: &'a Layout,
    mappings: &'a [Mapping],
    _access: [Option<CpuAccess<'a>>; MAX_PLANES],
}

impl BufferReader<'_> {
    /// The buffer's layout.
    pub fn layout(&self) -> &Layout {
        self.layout
    }

    /// Copies the start of row `row` of colour plane `plane` into `out`: as many bytes as `out` has, a row's pixels being
    /// [`Format::row_bytes`](crate::format::Format::row_bytes). What is outside the memory reads as zero.
    pub fn row(&self, plane: usize, row: u32, out: &mut [u8]) {
        let place = self.layout.planes().get(plane);
        let found = place.and_then(|place| Some((place, self.mappings.get(place.memory as usize)?)));
        match found {
            Some((place, mapping)) => {
                mapping.read(place.offset as usize + place.stride as usize * row as usize, out);
            }
            None => out.fill(0),
        }
    }

    /// The bytes of memory plane `memory`; `None` if there is none. For what must not, or need not, go through [`row`](Self::row).
    pub fn memory(&self, memory: u32) -> Option<Span<'_>> {
        self.mappings.get(memory as usize).map(Mapping::span)
    }
}

/// A buffer open for writing by the CPU; rows are copied in. Readable for devices when this is gone.
#[derive(Debug)]
pub struct BufferWriter<'a> {
    layout: &'a Layout,
    mappings: MutexGuard<'a, Vec<Mapping>>,
    access: [Option<CpuAccess<'a>>; MAX_PLANES],
}

impl BufferWriter<'_> {
    /// The buffer's layout.
    pub fn layout(&self) -> &Layout {
        self.layout
    }

    /// Copies `bytes` to the start of row `row` of colour plane `plane`. What is outside the memory is left out.
    pub fn row(&mut self, plane: usize, row: u32, bytes: &[u8]) {
        if let Some((mapping, offset)) = self.find(plane, row) {
            mapping.write(offset, bytes);
        }
    }

    /// Copies memory to row `row` of colour plane `plane` and, as far as it reaches, the rows after it. Whether all of it had a
    /// place; nothing is copied otherwise.
    pub fn rows(&mut self, plane: usize, row: u32, from: Span<'_>) -> bool {
        self.find(plane, row)
            .is_some_and(|(mapping, offset)| mapping.copy_from(offset, from))
    }

    /// Ends CPU access, so that devices see what was written. Dropping does the same and cannot report a failure.
    ///
    /// # Errors
    /// What `DMA_BUF_IOCTL_SYNC` says.
    pub fn end(self) -> Result<()> {
        self.access.into_iter().flatten().try_for_each(CpuAccess::end)
    }

    fn find(&mut self, plane: usize, row: u32) -> Option<(&mut Mapping, usize)> {
        let place = self.layout.planes().get(plane).filter(|_| row < self.layout.height())?;
        let mapping = self.mappings.get_mut(place.memory as usize)?;
        Some((mapping, place.offset as usize + place.stride as usize * row as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::memory::Allocator;

    fn plain(name: &str, size: (u32, u32)) -> Buffer {
        let layout = Layout::packed(Format::parse(name).unwrap().0, size, 1).unwrap();
        let len = layout.memory_len(0);
        Buffer::new(layout, vec![Allocator::Plain.allocate(len).unwrap()], &[len]).unwrap()
    }

    #[test]
    fn rows_come_from_the_plane_asked_for() {
        let buffer = plain("NV12", (4, 2));
        buffer.map(Access::ReadWrite).unwrap()[0].write(0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let reader = buffer.read().unwrap();
        let mut row = [0; 4];
        reader.row(0, 1, &mut row);
        assert_eq!(row, [5, 6, 7, 8]);
        reader.row(1, 0, &mut row);
        assert_eq!(row, [9, 10, 11, 12]);
        reader.row(7, 0, &mut row);
        assert_eq!(row, [0; 4]);
    }

    #[test]
    fn what_is_written_is_read() {
        let buffer = plain("NV12", (4, 4));
        let mut writer = buffer.write().unwrap();
        writer.row(0, 3, &[1, 2, 3, 4]);
        writer.row(1, 1, &[5, 6, 7, 8, 9]);
        writer.row(0, 4, &[1; 4]);
        writer.row(9, 0, &[1; 4]);
        let other = plain("GREY", (4, 4));
        other.write().unwrap().row(0, 1, &[7; 8]);
        let reader = other.read().unwrap();
        let span = reader.memory(0).unwrap();
        assert!(writer.rows(0, 0, span.part(4, 8).unwrap()));
        assert!(!writer.rows(1, 1, span), "{} bytes, of which not all fit", span.len());
        assert!(reader.memory(1).is_none());
        writer.end().unwrap();
        let (mut row, reader) = ([0; 4], buffer.read().unwrap());
        for (plane, at, expected) in [(0, 0, [7; 4]), (0, 1, [7; 4]), (0, 3, [1, 2, 3, 4]), (1, 1, [5, 6, 7, 8])] {
            reader.row(plane, at, &mut row);
            assert_eq!(row, expected);
        }
    }

    #[test]
    fn a_layout_must_fit_its_memory() {
        let layout = Layout::packed(Format::parse("XR24").unwrap().0, (64, 64), 1).unwrap();
        let memory = || vec![Allocator::Plain.allocate(4096).unwrap()];
        assert_eq!(Buffer::new(layout, memory(), &[4096]).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(Buffer::new(layout, memory(), &[]).unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn memory_lives_as_long_as_a_clone() {
        let buffer = plain("GREY", (8, 8));
        let (weak, clone) = (buffer.downgrade(), buffer.clone());
        assert!(weak.follows(&clone) && buffer.same_memory(&clone));
        assert!(!buffer.same_memory(&plain("GREY", (8, 8))));
        drop(buffer);
        assert!(!weak.is_gone());
        drop(clone);
        assert!(weak.is_gone() && weak.upgrade().is_none());
    }
}
