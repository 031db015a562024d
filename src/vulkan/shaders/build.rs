//! Makes SPIR-V of the shaders beside this file, for the feature `vulkan`: `NAME.wgsl` becomes `$OUT_DIR/NAME.spv`.

#[cfg(not(feature = "vulkan"))]
fn main() {
    println!("cargo::rerun-if-changed=src/vulkan/shaders/build.rs");
}

#[cfg(feature = "vulkan")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/vulkan/shaders");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    for entry in std::fs::read_dir("src/vulkan/shaders")? {
        let source = entry?.path();
        if source.extension().is_some_and(|extension| extension == "wgsl") {
            let name = source.file_stem().ok_or("a shader without a name")?;
            std::fs::write(out.join(name).with_extension("spv"), compile(&source)?)?;
        }
    }
    Ok(())
}

/// One shader module, its words in the byte order of this machine's targets (little-endian).
#[cfg(feature = "vulkan")]
fn compile(source: &std::path::Path) -> Result<Vec<u8>, String> {
    use naga::back::spv;
    use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    let text = std::fs::read_to_string(source).map_err(|cause| format!("{}: {cause}", source.display()))?;
    let path = source.display().to_string();
    let module = naga::front::wgsl::parse_str(&text).map_err(|error| error.emit_to_string_with_path(&text, &path))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::IMMEDIATES);
    let info = validator
        .validate(&module)
        .map_err(|error| error.emit_to_string_with_path(&text, &path))?;
    // The shaders stay inside their images by themselves; a clamp at each access would be paid for every pixel.
    let inside = BoundsCheckPolicy::Unchecked;
    let options = spv::Options {
        // Vulkan 1.1, the least that the library works with, reads SPIR-V up to 1.3.
        lang_version: (1, 3),
        flags: spv::WriterFlags::empty(),
        bounds_check_policies: BoundsCheckPolicies {
            index: inside,
            buffer: inside,
            image_load: inside,
            binding_array: inside,
        },
        ..spv::Options::default()
    };
    let words = spv::write_vec(&module, &info, &options, None).map_err(|error| format!("{path}: {error}"))?;
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}
