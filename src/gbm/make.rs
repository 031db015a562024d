//! The allocator: buffers that a device's driver lays out itself.

use std::io;
use std::ops::BitOr;

use super::Device;
use super::raw::RawBo;
use crate::causes::{Call, Cause};
use crate::dmabuf::DmaBuf;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Format, Layout, MAX_PLANES, Modifier, PlaneLayout};
use crate::frame::{Buffer, Room};
use crate::memory::Memory;

/// What a buffer is to be used for (`GBM_BO_USE_*`); several by `|`. The default, none, is for what is only read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Usage(u32);

impl Usage {
    /// A display shows it.
    pub const SCANOUT: Usage = Usage(1 << 0);
    /// A display shows it as its cursor.
    pub const CURSOR: Usage = Usage(1 << 1);
    /// The GPU draws into it.
    pub const RENDERING: Usage = Usage(1 << 2);
    /// Rows one after the other, whether or not the driver states so.
    pub const LINEAR: Usage = Usage(1 << 4);

    pub(super) const fn bits(self) -> u32 {
        self.0
    }
}

impl BitOr for Usage {
    type Output = Usage;

    fn bitor(self, other: Usage) -> Usage {
        Usage(self.0 | other.0)
    }
}

/// No more rows than these are asked of a driver to make room.
const MOST_ROWS: u32 = 1 << 24;

impl Device {
    /// Makes a buffer for a picture of this format, size and colour, laid out as the driver wants it. `room` is what others want of the
    /// memory. `modifiers` are the tilings that those who use it can take: of these the driver chooses one. With none given it chooses as
    /// it likes, for those alone who ask it; the layout's modifier is then what it states, often nothing.
    ///
    /// Where [`Modifier::LINEAR`] is among them and the driver knows no modifiers, the buffer is linear all the same
    /// (`GBM_BO_USE_LINEAR`), and its modifier is what the driver states: `None`, which is not LINEAR.
    ///
    /// The memory lives as long as the buffer and what has imported it: GBM's object, and its handle, are closed. Cost: some six system
    /// calls.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for a format that the driver makes no buffers of, or none of these tilings; otherwise what `gbm_bo_create` or
    /// the export says. [`Kind::Invalid`] where there is to be more room than the driver gives, as with formats of several colour planes.
    pub fn make_buffer(&self, layout: &Layout, room: &Room, usage: Usage, modifiers: &[Modifier]) -> Result<Buffer> {
        let format = layout.format();
        let code = format
            .drm()
            .ok_or_else(|| self.makes_none(format).because("DRM has no code for it"))?
            .0;
        let (width, height) = layout.size();
        let made = self.create((width, height), code, usage, modifiers, format)?;
        let Described { layout: found, memory } = self.describe(&made, layout)?;
        let Some((needed, have)) = lacks(&found, &memory, room)? else {
            return buffer(found, memory);
        };
        // One colour plane: more rows behind the picture's make room. With several they would lie between the planes.
        let stride = u64::from(found.planes().first().map_or(1, |plane| plane.stride).max(1));
        let rows = (needed as u64).div_ceil(stride);
        let short = |needed, have| {
            let error = Error::new(Kind::Invalid, "make a buffer of", format!("{} for {layout}", self.name()));
            let error = error.because(format!("{needed} bytes are asked for, and the driver makes {have}"));
            error.repair("use buffers of the display, of a dma-heap or of udmabuf")
        };
        let rows = match u32::try_from(rows) {
            Ok(rows) if found.planes().len() == 1 && rows <= MOST_ROWS => rows,
            _ => return Err(short(needed, have)),
        };
        drop((made, memory));
        let made = self.create((width, rows), code, usage, modifiers, format)?;
        let Described { layout: found, memory } = self.describe(&made, layout)?;
        match lacks(&found, &memory, room)? {
            None => buffer(found, memory),
            Some((needed, have)) => Err(short(needed, have)),
        }
    }

    /// Makes the object itself.
    fn create(
        &self,
        size: (u32, u32),
        code: u32,
        usage: Usage,
        modifiers: &[Modifier],
        format: Format,
    ) -> Result<RawBo> {
        let raw = self.raw();
        let made = if modifiers.is_empty() {
            raw.create(size, code, usage.bits())
        } else {
            let list: Vec<u64> = modifiers.iter().map(|modifier| modifier.to_drm()).collect();
            let made = raw.create_with_modifiers(size, code, usage.bits(), &list);
            let linear = modifiers.contains(&Modifier::LINEAR);
            // Of a driver without modifiers: ENOSYS, or EINVAL (gbm_dri_bo_create).
            made.or_else(|cause| match linear {
                true => raw.create(size, code, (usage | Usage::LINEAR).bits()),
                false => Err(cause),
            })
        };
        let made = made.map_err(|cause| self.not_made(code, usage, modifiers, format, cause))?;
        let stated = Modifier::from_drm(made.modifier());
        match stated {
            Some(stated) if !modifiers.is_empty() && !modifiers.contains(&stated) => Err(self
                .makes_none(format)
                .because(format!("it made one of tiling {stated}, which nobody asked for"))
                .repair("ask for that tiling too, or for none")),
            None if !modifiers.is_empty() && !modifiers.contains(&Modifier::LINEAR) => Err(self
                .makes_none(format)
                .because("it states no tiling, and only stated ones were asked for")
                .repair("ask for LINEAR, or for none")),
            _ => Ok(made),
        }
    }

    fn not_made(&self, code: u32, usage: Usage, modifiers: &[Modifier], format: Format, cause: io::Error) -> Error {
        let error = self.makes_none(format);
        if !self.raw().makes(code, Usage::default().bits()) {
            let driver = &self.info().driver;
            let error = error.because(format!("GBM for the driver {driver} makes no buffers of this format"));
            return error.repair("choose another format, or buffers of a dma-heap or udmabuf");
        }
        if !self.raw().makes(code, usage.bits()) {
            let error = error.because(format!("GBM makes none for this usage (GBM_BO_USE_* of {:#x})", usage.bits()));
            return error.repair("ask for fewer uses, or use buffers of a dma-heap or udmabuf");
        }
        let is_render = self
            .info()
            .path
            .file_name()
            .is_some_and(|node| node.to_string_lossy().starts_with("render"));
        let errno = cause.raw_os_error().filter(|&errno| errno != 0);
        let error = match errno {
            Some(_) => Error::from_io("make a buffer of", self.subject(format), cause),
            None => error.because("the driver gave no reason"),
        };
        // The kernel's dumb buffers, which Mesa's software renderer makes, are for cards (no DRM_RENDER_ALLOW in drm_ioctl.c).
        let refused = errno.is_none_or(|errno| matches!(errno, nix::libc::EACCES | nix::libc::EPERM));
        if is_render && refused {
            return error
                .said_by(Call::GbmCreate.name())
                .repair("try the card of the same device: gbm:/dev/dri/cardN");
        }
        let unlike = errno.is_none_or(|errno| matches!(errno, nix::libc::ENOSYS | nix::libc::EINVAL));
        if unlike && !modifiers.is_empty() && !modifiers.contains(&Modifier::LINEAR) {
            let names: Vec<_> = modifiers.iter().map(ToString::to_string).collect();
            let repair = format!("it may have none of these tilings: {}; ask for LINEAR, or for none", names.join(" "));
            return error.said_by(Call::GbmCreate.name()).repair(repair);
        }
        let Cause { why, repair } = Call::GbmCreate.cause(errno.unwrap_or(nix::libc::EINVAL));
        error.said_by(Call::GbmCreate.name()).meaning(why).repair(repair)
    }

    fn subject(&self, format: Format) -> String {
        format!("{} for {format}", self.name())
    }

    fn makes_none(&self, format: Format) -> Error {
        Error::new(Kind::Unsupported, "make a buffer of", self.subject(format)).said_by(Call::GbmCreate.name())
    }

    /// Layout and memory of an object that was just made.
    fn describe(&self, made: &RawBo, wished: &Layout) -> Result<Described> {
        let format = wished.format();
        let count = made.planes();
        if count != format.planes() {
            // A tiling with planes of its own (compression) is for those who ask GBM, not for those who read pixels.
            let error = self.makes_none(format);
            let error = error.because(format!("it made {count} planes, and the format has {}", format.planes()));
            return Err(error.repair("ask for LINEAR"));
        }
        let mut places = [PlaneLayout::default(); MAX_PLANES];
        let mut memory: Vec<DmaBuf> = Vec::with_capacity(1);
        for (index, place) in (0..).zip(places.iter_mut().take(count)) {
            let exported = made.export(index).context("export a buffer of", || self.name())?;
            let exported = DmaBuf::new(exported)?;
            let known = memory.iter().position(|other| other.identity() == exported.identity());
            let at = known.unwrap_or_else(|| {
                memory.push(exported);
                memory.len() - 1
            });
            let (offset, stride) = made.place(index);
            *place = PlaneLayout { memory: u32::try_from(at).unwrap_or(u32::MAX), offset, stride };
        }
        let layout = Layout::new(format, wished.size(), &places[..count]);
        let layout = layout.map_err(|cause| self.makes_none(format).because(cause))?;
        let layout = layout
            .with_modifier(Modifier::from_drm(made.modifier()))
            .with_colour(wished.colour());
        Ok(Described { layout, memory })
    }
}

struct Described {
    layout: Layout,
    memory: Vec<DmaBuf>,
}

/// The bytes that are asked for, and those that there are, of the first memory plane that is too short.
fn lacks(layout: &Layout, memory: &[DmaBuf], room: &Room) -> Result<Option<(usize, usize)>> {
    for (plane, memory) in (0u32..).zip(memory) {
        let needed = room.len(layout, plane)?;
        if memory.len() < needed {
            return Ok(Some((needed, memory.len())));
        }
    }
    Ok(None)
}

fn buffer(layout: Layout, memory: Vec<DmaBuf>) -> Result<Buffer> {
    let lens: Vec<_> = memory.iter().map(DmaBuf::len).collect();
    Buffer::new(layout, memory.into_iter().map(Memory::DmaBuf).collect(), &lens)
}
