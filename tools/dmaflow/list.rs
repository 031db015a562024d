//! `dmaflow list`: what this machine has.

use std::process::ExitCode;

use dmaflow::format::Format;
use dmaflow::kms::{Card, ConnectorOffer};
use dmaflow::memory::Allocator;
use dmaflow::v4l2::{Api, Device, FormatOffer};
use serde::Serialize;

use crate::args::ListArgs;
use crate::list_shares::{ShareListing, shares};
use crate::output;

#[derive(Serialize)]
struct Listing {
    cameras: Vec<CameraListing>,
    displays: Vec<DisplayListing>,
    gbm: GbmListing,
    gpus: Vec<GpuEntry>,
    allocators: Vec<AllocatorListing>,
    shared: Vec<SharedListing>,
    /// What this user's processes share, in `$XDG_RUNTIME_DIR/dmaflow/`.
    shares: Vec<ShareListing>,
    /// Devices that are there and could not be opened, and why.
    refused: Vec<String>,
}

#[derive(Serialize)]
struct CameraListing {
    path: String,
    driver: String,
    card: String,
    multi_planar: bool,
    inputs: Vec<String>,
    formats: Vec<FormatListing>,
}

#[derive(Serialize)]
struct FormatListing {
    v4l2: String,
    /// The name of the format here and in DRM; left out for those that dmaflow does not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_planes: Option<u32>,
    description: String,
    sizes: Vec<SizesListing>,
}

#[derive(Serialize)]
struct SizesListing {
    size: String,
    rates: Vec<String>,
}

#[derive(Serialize)]
struct DisplayListing {
    path: String,
    driver: String,
    description: String,
    connectors: Vec<ConnectorListing>,
    formats: Vec<String>,
}

#[derive(Serialize)]
struct ConnectorListing {
    name: String,
    connected: bool,
    modes: Vec<String>,
}

/// What GPU drivers import and make.
#[derive(Serialize)]
struct GbmListing {
    devices: Vec<GbmDeviceListing>,
    /// Why there is none, or not all.
    why_not: Vec<String>,
    /// What the drivers' libraries printed meanwhile.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    said: Vec<String>,
}

#[derive(Serialize)]
struct GbmDeviceListing {
    path: String,
    driver: String,
    /// The formats that it imports; left out where none could be tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    imports: Option<Vec<String>>,
    /// The formats in which it makes buffers for a camera to fill.
    makes: Vec<String>,
}

#[derive(Serialize)]
struct GpuEntry {
    name: String,
    driver: String,
    kind: String,
    /// Whether the CPU does its work.
    software: bool,
    vulkan: String,
    nodes: Vec<String>,
    /// What it can import, to be sampled.
    formats: Vec<GpuFormatListing>,
    memory_handles: Vec<HandleListing>,
    /// Which way fences go, as sync files.
    sync_fd: SyncListing,
}

#[derive(Serialize)]
struct SyncListing {
    semaphore: Ways,
    fence: Ways,
}

#[derive(Serialize)]
struct Ways {
    importable: bool,
    exportable: bool,
}

#[derive(Serialize)]
struct GpuFormatListing {
    format: String,
    modifiers: Vec<ModifierListing>,
}

#[derive(Serialize)]
struct ModifierListing {
    modifier: String,
    planes: u32,
    /// Names of the specification, without `VK_FORMAT_FEATURE_` and `_BIT`.
    features: Vec<String>,
    /// Whether all colour planes can be one image; otherwise each is one.
    as_one_image: bool,
    /// Whether the planes may lie in several dma-bufs.
    several_dma_bufs: bool,
    exportable: bool,
}

#[derive(Serialize)]
struct HandleListing {
    handle: &'static str,
    importable: bool,
    exportable: bool,
}

#[derive(Serialize)]
struct AllocatorListing {
    name: String,
    node: &'static str,
    available: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
}

#[derive(Serialize)]
struct SharedListing {
    camera: String,
    display: String,
    formats: Vec<String>,
}

pub fn run(args: &ListArgs) -> anyhow::Result<ExitCode> {
    output::check()?;
    let mut listing = Listing {
        cameras: vec![],
        displays: vec![],
        gbm: gbm(),
        gpus: vec![],
        allocators: allocators(),
        shared: vec![],
        shares: shares(),
        refused: vec![],
    };
    let mut camera_formats = Vec::new();
    for info in Device::list() {
        let device = match info.and_then(|info| Device::open(&info.path)) {
            Ok(device) => device,
            Err(error) => {
                listing.refused.push(error.line());
                continue;
            }
        };
        let offers = device.formats()?;
        let known: Vec<Format> = offers.iter().filter_map(|offer| Some(offer.known?.0)).collect();
        camera_formats.push((device.name(), known));
        listing.cameras.push(camera(&device, &offers)?);
    }
    for info in Card::list() {
        let card = match info.and_then(|info| Card::open(&info.path)) {
            Ok(card) => card,
            Err(error) => {
                listing.refused.push(error.line());
                continue;
            }
        };
        let info = card.info();
        let formats = card.formats()?;
        let display = info.path.display().to_string();
        for (camera, known) in &camera_formats {
            let shared = formats
                .iter()
                .filter(|format| known.contains(format))
                .map(Format::to_string)
                .collect();
            listing
                .shared
                .push(SharedListing { camera: camera.clone(), display: display.clone(), formats: shared });
        }
        listing.displays.push(DisplayListing {
            path: display,
            driver: info.driver.clone(),
            description: info.description.clone(),
            connectors: card.connectors()?.iter().map(connector).collect(),
            formats: formats.iter().map(Format::to_string).collect(),
        });
    }
    #[cfg(feature = "vulkan")]
    gpus(&mut listing);
    let text = if args.json { serde_json::to_string(&listing)? } else { table(&listing) };
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn camera(device: &Device, offers: &[FormatOffer]) -> anyhow::Result<CameraListing> {
    let mut formats = Vec::with_capacity(offers.len());
    for offer in offers {
        let mut sizes = Vec::new();
        for range in device.sizes(offer.code)? {
            // The rates of a range are those of its largest size.
            let rates = device.rates(offer.code, range.nearest((u32::MAX, u32::MAX)))?;
            sizes
                .push(SizesListing { size: range.to_string(), rates: rates.iter().map(ToString::to_string).collect() });
        }
        formats.push(FormatListing {
            v4l2: offer.code.to_string(),
            format: offer.known.map(|(format, _)| format.to_string()),
            memory_planes: offer.known.map(|(_, planes)| planes),
            description: offer.description.clone(),
            sizes,
        });
    }
    let info = device.info();
    Ok(CameraListing {
        path: info.path.display().to_string(),
        driver: info.driver.clone(),
        card: info.card.clone(),
        multi_planar: info.api == Api::MultiPlanar,
        inputs: device.inputs()?.into_iter().map(|input| input.name).collect(),
        formats,
    })
}

#[cfg(feature = "gbm")]
fn gbm() -> GbmListing {
    let names = |formats: &[Format]| formats.iter().map(Format::to_string).collect::<Vec<_>>();
    let mut listing = GbmListing { devices: vec![], why_not: vec![], said: vec![] };
    // Mesa tells of what it tries in vain, also where it goes on with success.
    let ((), said) = crate::hear::hear(|| {
        for device in dmaflow::gbm::Device::list() {
            match device {
                Ok(device) => listing.devices.push(GbmDeviceListing {
                    path: device.name(),
                    driver: device.info().driver.clone(),
                    imports: device.formats().map(names),
                    makes: names(&device.formats_made()),
                }),
                Err(error) => listing.why_not.push(error.line()),
            }
        }
    });
    GbmListing { said, ..listing }
}

#[cfg(not(feature = "gbm"))]
fn gbm() -> GbmListing {
    GbmListing { devices: vec![], why_not: vec![crate::ends::NO_GBM.to_owned()], said: vec![] }
}

fn connector(offer: &ConnectorOffer) -> ConnectorListing {
    let modes = offer.modes.iter().map(|mode| {
        let preferred = if mode.preferred { " preferred" } else { "" };
        format!("{}x{}@{:.2}{preferred}", mode.size.0, mode.size.1, mode.refresh)
    });
    ConnectorListing { name: offer.name.clone(), connected: offer.connected, modes: modes.collect() }
}

/// The GPUs, or why there are none: a machine without Vulkan is no failure.
#[cfg(feature = "vulkan")]
fn gpus(listing: &mut Listing) {
    use dmaflow::vulkan::Gpu;

    let all = Gpu::list().unwrap_or_else(|error| vec![Err(error)]);
    for gpu in all {
        match gpu {
            Ok(gpu) => listing.gpus.push(gpu_entry(&gpu)),
            Err(error) => listing.refused.push(error.line()),
        }
    }
}

#[cfg(feature = "vulkan")]
fn gpu_entry(gpu: &dmaflow::vulkan::GpuListing) -> GpuEntry {
    let modifier = |offer: &dmaflow::vulkan::ModifierOffer| ModifierListing {
        modifier: offer.modifier.to_string(),
        planes: offer.planes,
        features: format!("{:?}", offer.features).split(" | ").map(str::to_owned).collect(),
        as_one_image: offer.as_one,
        several_dma_bufs: offer.disjoint,
        exportable: offer.exportable,
    };
    let format = |offer: &dmaflow::vulkan::GpuOffer| GpuFormatListing {
        format: offer.format.to_string(),
        modifiers: offer.modifiers.iter().map(modifier).collect(),
    };
    let (major, minor, patch) = gpu.info.version;
    GpuEntry {
        name: gpu.info.name.clone(),
        driver: gpu.info.driver.clone(),
        kind: gpu.info.kind.to_string(),
        software: gpu.info.is_software(),
        vulkan: format!("{major}.{minor}.{patch}"),
        nodes: gpu.info.nodes.iter().map(|node| node.display().to_string()).collect(),
        formats: gpu.offers.iter().map(format).collect(),
        sync_fd: SyncListing {
            semaphore: Ways { importable: gpu.sync.import_semaphore, exportable: gpu.sync.export_semaphore },
            fence: Ways { importable: gpu.sync.import_fence, exportable: gpu.sync.export_fence },
        },
        memory_handles: gpu
            .handles
            .iter()
            .map(|offer| HandleListing {
                handle: offer.name,
                importable: offer.importable,
                exportable: offer.exportable,
            })
            .collect(),
    }
}

fn allocators() -> Vec<AllocatorListing> {
    let listing = |allocator: Allocator| {
        let available = allocator.available();
        Some(AllocatorListing {
            name: allocator.to_string(),
            node: allocator.node()?,
            available: available.is_ok(),
            why_not: available.err().map(|error| error.line()),
        })
    };
    Allocator::DMA_BUF.into_iter().filter_map(listing).collect()
}

fn table(listing: &Listing) -> String {
    let mut lines = Vec::new();
    let none = |lines: &mut Vec<String>| lines.push("  none".to_owned());
    lines.push("cameras".to_owned());
    for camera in &listing.cameras {
        let planes = if camera.multi_planar { ", multi-planar" } else { "" };
        lines.push(format!("  {}  {} ({}{planes})", camera.path, camera.card, camera.driver));
        if camera.inputs.len() > 1 {
            lines.push(format!("    inputs   {}", numbered(&camera.inputs)));
        }
        let mut known: Vec<_> = camera.formats.iter().filter_map(|format| format.format.clone()).collect();
        known.dedup();
        lines.push(format!("    formats  {}", known.join(" ")));
        let others = camera.formats.iter().filter(|format| format.format.is_none());
        let others: Vec<_> = others.map(|format| format.v4l2.as_str()).collect();
        if !others.is_empty() {
            lines.push(format!("    unknown  {} (V4L2's codes)", others.join(" ")));
        }
        if let Some(first) = camera.formats.first() {
            for range in &first.sizes {
                lines.push(format!("    size     {} at {} fps", range.size, range.rates.join(", ")));
            }
        }
    }
    if listing.cameras.is_empty() {
        none(&mut lines);
    }
    lines.push("displays".to_owned());
    for display in &listing.displays {
        lines.push(format!("  {}  {} ({})", display.path, display.description, display.driver));
        for connector in &display.connectors {
            let state = match (connector.connected, connector.modes.first()) {
                (true, Some(mode)) => format!("connected, {mode} and {} more modes", connector.modes.len() - 1),
                (true, None) => "connected, no modes".to_owned(),
                (false, _) => "nothing connected".to_owned(),
            };
            lines.push(format!("    {}  {state}", connector.name));
        }
        lines.push(format!("    formats  {}", display.formats.join(" ")));
    }
    if listing.displays.is_empty() {
        none(&mut lines);
    }
    lines.push("GBM".to_owned());
    for device in &listing.gbm.devices {
        let list = |formats: &[String]| if formats.is_empty() { "nothing".to_owned() } else { formats.join(" ") };
        lines.push(format!("  {}  ({})", device.path, device.driver));
        let imports = device.imports.as_deref().map_or_else(|| "not tried".to_owned(), list);
        lines.push(format!("    imports  {imports}"));
        lines.push(format!("    makes    {}", list(&device.makes)));
    }
    lines.extend(listing.gbm.why_not.iter().map(|line| format!("  {line}")));
    lines.extend(listing.gbm.said.iter().map(|line| format!("  said by libgbm: {line}")));
    if listing.gbm.devices.is_empty() && listing.gbm.why_not.is_empty() {
        none(&mut lines);
    }
    gpu_lines(listing, &mut lines);
    lines.push("allocators".to_owned());
    for allocator in &listing.allocators {
        let why = allocator.why_not.as_deref().map_or(String::new(), |why| format!(": {why}"));
        let state = if allocator.available { "available" } else { "not available" };
        lines.push(format!("  {}  {state}{why}", allocator.name));
    }
    lines.push("shared formats".to_owned());
    for pair in &listing.shared {
        let formats = if pair.formats.is_empty() { "none".to_owned() } else { pair.formats.join(" ") };
        lines.push(format!("  {} to {}  {formats}", pair.camera, pair.display));
    }
    if listing.shared.is_empty() {
        none(&mut lines);
    }
    lines.push("shares".to_owned());
    for share in &listing.shares {
        lines.push(format!("  {}  {}", share.name, share.state()));
    }
    if listing.shares.is_empty() {
        none(&mut lines);
    }
    if !listing.refused.is_empty() {
        lines.push("not to be opened".to_owned());
        lines.extend(listing.refused.iter().map(|line| format!("  {line}")));
    }
    lines.join("\n")
}

fn gpu_lines(listing: &Listing, lines: &mut Vec<String>) {
    lines.push("GPUs".to_owned());
    for gpu in &listing.gpus {
        let nodes = if gpu.nodes.is_empty() { String::new() } else { format!(", {}", gpu.nodes.join(" ")) };
        lines.push(format!("  {}  {} (Vulkan {}, {}{nodes})", gpu.name, gpu.driver, gpu.vulkan, gpu.kind));
        let formats = gpu.formats.iter().map(|offer| match offer.modifiers.as_slice() {
            [only] if only.modifier == "LINEAR" => offer.format.clone(),
            several => format!("{} ({} modifiers)", offer.format, several.len()),
        });
        lines.push(format!("    imports  {}", formats.collect::<Vec<_>>().join(" ")));
        let handles = gpu.memory_handles.iter().filter(|offer| offer.importable || offer.exportable);
        let handles = handles.map(|offer| format!("{}{}", offer.handle, alone(offer.importable, offer.exportable)));
        lines.push(format!("    memory   {}", handles.collect::<Vec<_>>().join(", ")));
        let fences = [("SYNC_FD semaphores", &gpu.sync_fd.semaphore), ("SYNC_FD fences", &gpu.sync_fd.fence)];
        let fences = fences.iter().filter(|(_, ways)| ways.importable || ways.exportable);
        let fences: Vec<_> = fences
            .map(|(name, ways)| format!("{name}{}", alone(ways.importable, ways.exportable)))
            .collect();
        lines.push(format!("    fences   {}", if fences.is_empty() { "none".to_owned() } else { fences.join(", ") }));
    }
    if listing.gpus.is_empty() {
        lines.push("  none".to_owned());
    }
}

/// What to say of something that goes one way alone.
fn alone(importable: bool, exportable: bool) -> &'static str {
    match (importable, exportable) {
        (true, false) => " (import alone)",
        (false, true) => " (export alone)",
        _ => "",
    }
}

fn numbered(names: &[String]) -> String {
    names
        .iter()
        .enumerate()
        .map(|(index, name)| format!("{index} {name}"))
        .collect::<Vec<_>>()
        .join(", ")
}
