//! `png:FILE`: the newest frame, as a picture in a file.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::clock::now_us;
use crate::endpoint::{JoinError, Refusal, Rung, Shown, Sink};
use crate::error::{Context, Error, Kind, Result};
use crate::fence::PATIENCE;
use crate::format::{Format, Kind as Samples, Layout, MAX_PLANES, Modifier, Pixels, demosaic};
use crate::frame::{Buffer, BufferReader, Frame};
use crate::ledger::Ledger;

/// A [`Sink`] that keeps the newest frame and writes it to a file as PNG at the end.
///
/// It holds the lease of that one frame and lets go of the frame before, so a frame counts as shown when it was taken;
/// the file gets the last one. The file is complete or not there: it is written beside its place and then renamed.
#[derive(Debug)]
pub struct Png {
    name: String,
    path: PathBuf,
    newest: Option<Frame>,
    written: bool,
    ledger: Ledger,
}

impl Png {
    /// The cause of its copies in the [`Ledger`].
    pub const CAUSE: &'static str = "picture for a PNG file";

    /// A sink that will write to `path`. Nothing happens there yet. `-` is a file of that name: a picture does not go to stdout.
    pub fn new(path: impl Into<PathBuf>) -> Png {
        let path = path.into();
        Png { name: format!("png:{}", path.display()), path, newest: None, written: false, ledger: Ledger::new() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Sink for Png {
    fn name(&self) -> &str {
        &self.name
    }

    fn formats(&self) -> Option<Vec<Format>> {
        None
    }

    /// Also finds out early what would else fail at the end: whether the file has a place, and whether the CPU can read
    /// the buffers.
    fn join(&mut self, layout: &Layout, _: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        place_of(&self.path)?;
        let refusal = |step, errno, why| Refusal {
            rung: Rung::Copied,
            step,
            errno,
            why,
            repair: "ask the source for linear buffers that the CPU can read".to_owned(),
        };
        if let Some(modifier) = tiled(layout) {
            return Err(refusal("modifier", None, format!("its rows are tiled ({modifier})")).into());
        }
        if let Some(buffer) = buffers.first() {
            buffer
                .read()
                .map(drop)
                .map_err(|cause| refusal("mmap", cause.errno(), cause.line()))?;
        }
        Ok(Rung::Copied)
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        let meta = *frame.meta();
        self.newest = Some(frame);
        Ok(Some(Shown { meta, at_us: now_us() }))
    }

    fn finish(&mut self) -> Result<Option<Shown>> {
        match self.newest.take() {
            Some(frame) => {
                let rgb = frame_to_rgb(&frame)?;
                let layout = frame.buffer().layout();
                self.ledger.enter(Png::CAUSE, layout.pixel_bytes());
                write_png(&self.path, layout.width(), layout.height(), &rgb)?;
                self.written = true;
                Ok(None)
            }
            None if self.written => Ok(None),
            None => Err(about(&self.path, Kind::Ended).because("no frame came")),
        }
    }

    fn ledger(&self) -> &Ledger {
        &self.ledger
    }
}

/// A frame's picture as rows of red, green and blue bytes, without padding. Reads each byte of its pixels once, after its acquire fence
/// has signalled.
///
/// # Errors
/// As [`Frame::wait_acquired`] and [`buffer_to_rgb`]; [`Kind::Revoked`] if who shares the frame has taken it back meanwhile.
pub fn frame_to_rgb(frame: &Frame) -> Result<Vec<u8>> {
    frame.wait_acquired(PATIENCE)?;
    let rgb = buffer_to_rgb(frame.buffer())?;
    frame.check()?;
    Ok(rgb)
}

/// A buffer's picture as rows of red, green and blue bytes, without padding. Reads each byte of its pixels once. The
/// caller sees to it that nobody fills the buffer meanwhile.
///
/// # Errors
/// [`Kind::Unsupported`] for tiled memory; what the exporter says if the CPU may not read.
pub fn buffer_to_rgb(buffer: &Buffer) -> Result<Vec<u8>> {
    let layout = buffer.layout();
    if let Some(modifier) = tiled(layout) {
        return Err(Error::new(Kind::Unsupported, "read the picture in", layout.to_string())
            .because(format!("its rows are tiled ({modifier})"))
            .repair("ask the source for linear buffers"));
    }
    let (format, (width, height)) = (layout.format(), layout.size());
    let (_, vertical) = format.subsampling();
    let reader = buffer.read()?;
    let mut rows: [Vec<u8>; MAX_PLANES] = Default::default();
    for (plane, row) in rows.iter_mut().enumerate().take(format.planes()) {
        row.resize(format.row_bytes(plane, width) as usize, 0);
    }
    let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
    if matches!(format.kind(), Samples::Bayer { .. }) {
        bayer_to_rgb(&reader, &mut rgb);
        return Ok(rgb);
    }
    for y in 0..height {
        for (plane, row) in rows.iter_mut().enumerate().take(format.planes()) {
            if plane == 0 {
                reader.row(plane, y, row);
            } else if y % vertical == 0 {
                reader.row(plane, y / vertical, row);
            }
        }
        let mut colour = Pixels::new(format, &rows.each_ref().map(Vec::as_slice)).colours(layout.colour());
        for x in 0..width {
            let pixel = colour(x);
            rgb.extend_from_slice(&[pixel.r, pixel.g, pixel.b]);
        }
    }
    Ok(rgb)
}

/// The picture of a Bayer format, interpolated from three rows at a time.
fn bayer_to_rgb(reader: &BufferReader<'_>, rgb: &mut Vec<u8>) {
    let layout = *reader.layout();
    let (format, (width, height)) = (layout.format(), layout.size());
    let row = |y: u32| {
        let mut row = vec![0; format.row_bytes(0, width) as usize];
        reader.row(0, y, &mut row);
        row
    };
    let last = height.saturating_sub(1);
    // Mirrored at the edges.
    let [mut above, mut own] = [1.min(last), 0].map(row);
    for y in 0..height {
        let below = row(if y < last { y + 1 } else { last.saturating_sub(1) });
        let rows = [&above, &own, &below].map(|row| Pixels::new(format, &[row]));
        for x in 0..width {
            let pixel = demosaic(format, &rows, (x, y), width).unwrap_or_default();
            rgb.extend_from_slice(&[pixel.r, pixel.g, pixel.b]);
        }
        (above, own) = (own, below);
    }
}

/// Writes a picture of 8 bits a channel to a PNG file, which is complete or not there: it is written under another name
/// in the same folder and then renamed. A file that was there is replaced; a link is followed.
///
/// # Errors
/// [`Kind::Invalid`] if `rgb` is not `width * height * 3` bytes, or if something that is no file has that name; else
/// what the file system says.
pub fn write_png(path: &Path, width: u32, height: u32, rgb: &[u8]) -> Result<()> {
    let expected = u64::from(width) * u64::from(height) * 3;
    if expected == 0 || rgb.len() as u64 != expected {
        let why = format!("{} bytes are not a picture of {width}x{height}", rgb.len());
        return Err(about(path, Kind::Invalid).because(why));
    }
    let place = place_of(path)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(place.file_name().unwrap_or_default());
    // Another process, or another thread of this one, may be writing the same picture.
    name.push(format!(".{}.{:x}", std::process::id(), crate::clock::now_ns()));
    let temporary = Temporary(place.with_file_name(name));
    let file = File::create_new(&temporary.0).context("write", || path.display().to_string())?;
    encode(file, width, height, rgb).context("write", || path.display().to_string())?;
    fs::rename(&temporary.0, &place).context("write", || path.display().to_string())?;
    // It has its name now; what is under the temporary one, should there be something, is not ours.
    std::mem::forget(temporary);
    Ok(())
}

/// A file that goes away unless it is renamed first.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing more can be done about a file that cannot be removed.
        let _ = fs::remove_file(&self.0);
    }
}

fn encode(file: File, width: u32, height: u32, rgb: &[u8]) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    let mut encoder = ::png::Encoder::new(&mut out, width, height);
    encoder.set_color(::png::ColorType::Rgb);
    encoder.set_depth(::png::BitDepth::Eight);
    encoder.set_compression(::png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(rgb)?;
    writer.finish()?;
    out.flush()
}

/// Where the file really is: renaming onto a link would replace the link, and onto `/dev/null` the device.
fn place_of(path: &Path) -> Result<PathBuf> {
    match fs::metadata(path) {
        Ok(there) if there.is_file() => path.canonicalize().context("write", || path.display().to_string()),
        Ok(_) => Err(about(path, Kind::Invalid).because("something that is not a file has that name")),
        Err(_) => {
            let folder = path
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            let there = fs::metadata(folder).context("write", || path.display().to_string())?;
            match path.file_name() {
                Some(_) if there.is_dir() => Ok(path.to_owned()),
                _ => Err(about(path, Kind::Invalid).because("it does not name a file in a folder")),
            }
        }
    }
}

fn about(path: &Path, kind: Kind) -> Error {
    Error::new(kind, "write", path.display().to_string())
}

fn tiled(layout: &Layout) -> Option<Modifier> {
    layout.modifier().filter(|&modifier| modifier != Modifier::LINEAR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Ready, Source};
    use crate::memory::Allocator;
    use crate::pattern::{Pattern, PatternRequest};

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("dmaflow-png-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    fn pixels(path: &Path) -> (u32, u32, Vec<u8>) {
        let mut reader = ::png::Decoder::new(io::BufReader::new(File::open(path).unwrap()))
            .read_info()
            .unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        (info.width, info.height, bytes)
    }

    #[test]
    fn the_file_gets_the_newest_frame() {
        let folder = folder("newest");
        let path = folder.join("frame.png");
        let request = PatternRequest {
            format: Format::parse("NV12").map(|(format, _)| format),
            size: (65, 49),
            rate: 1000.0,
            allocator: Some(Allocator::Plain),
            ..PatternRequest::default()
        };
        let mut source = Pattern::new(&request).unwrap();
        let mut sink = Png::new(&path);
        assert_eq!(sink.join(source.layout(), source.rate(), source.buffers()).unwrap(), Rung::Copied);
        source.start().unwrap();
        let mut last = Vec::new();
        let mut taken = 0;
        while taken < 6 {
            if let Some(frame) = source.try_next(Ready::FRAME).unwrap() {
                last = frame_to_rgb(&frame).unwrap();
                sink.present(frame).unwrap();
                assert_eq!(source.slots().dequeued, 1, "it holds one frame");
                taken += 1;
            }
        }
        assert!(!path.exists());
        sink.finish().unwrap();
        sink.finish().unwrap();
        assert_eq!(source.slots().dequeued, 0);
        assert_eq!(pixels(&path), (65, 49, last));
        assert_eq!((sink.ledger().entries()[0].cause, sink.ledger().bytes()), (Png::CAUSE, 65 * 49 + 66 * 25));
        assert_eq!(entries(&folder), 1);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn failures_name_the_file_and_leave_nothing() {
        let folder = folder("failures");
        let missing = folder.join("no/frame.png");
        let error = write_png(&missing, 1, 1, &[0; 3]).unwrap_err();
        assert!(error.line().contains("no/frame.png"), "{error:?}");
        assert_eq!(error.kind(), Kind::NotFound);
        let path = folder.join("frame.png");
        assert_eq!(write_png(&path, 2, 1, &[0; 3]).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(write_png(&path, 0, 1, &[]).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(write_png(&folder, 1, 1, &[0; 3]).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(write_png(Path::new("/dev/null"), 1, 1, &[0; 3]).unwrap_err().kind(), Kind::Invalid);
        let error = Png::new(&path).finish().unwrap_err();
        assert!(error.line().contains("frame.png: no frame came"), "{error:?}");
        assert_eq!(entries(&folder), 0);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_link_is_followed_and_a_file_replaced() {
        let folder = folder("links");
        let (real, link) = (folder.join("real.png"), folder.join("link.png"));
        fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink("real.png", &link).unwrap();
        write_png(&link, 1, 1, &[1, 2, 3]).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(pixels(&real), (1, 1, vec![1, 2, 3]));
        assert_eq!(entries(&folder), 2);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn tiled_memory_is_refused() {
        let layout = Layout::packed(Format::parse("XR24").unwrap().0, (8, 8), 1).unwrap();
        let layout = layout.with_modifier(Modifier::from_drm(1));
        let joined = Png::new(std::env::temp_dir().join("never.png")).join(&layout, None, &[]);
        assert!(matches!(joined, Err(JoinError::Refused(refusal)) if refusal.step == "modifier"));
        let buffer = Buffer::new(layout, vec![Allocator::Plain.allocate(256).unwrap()], &[256]).unwrap();
        assert_eq!(buffer_to_rgb(&buffer).unwrap_err().kind(), Kind::Unsupported);
    }
}
